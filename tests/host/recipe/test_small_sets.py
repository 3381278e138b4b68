"""Small sets: each class is tested where it can be, and what a set is too small for is said before
any work.
"""

import json

import numpy as np
import pytest
from PIL import Image

from edgeclip.device.images import ImageRef, index_folder
from edgeclip.device.intervals import drop_limits
from edgeclip.host import data, recipe
from edgeclip.host.data import enough
from edgeclip.host.data.split import draw, split
from tests.support.command import mistake, run
from tests.support.files import same, snapshot, write
from tests.support.tiny_recipe import RECIPE


def content(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)


def photos(root, counts):
    """Write so many different photos of each class."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            Image.fromarray(content(seed)).resize((40, 40)).save(root / name / f"{i}.png")
    return root


def classes_of(root):
    found = []
    for label, folder in enumerate(sorted(root.iterdir())):
        images = index_folder(folder)
        found.append([p._replace(key=f"{folder.name}/{p.key}", label=label) for p in images])
    return found


def keys(images):
    return {image.key for image in images}


# --- the split


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize(
    "sizes", [[1, 2, 3], [3] * 40, [5, 10, 40], [40, 1], [200, 3, 3, 2], [7] * 3]
)
def test_every_class_of_three_has_a_test_and_a_training_photo(tmp_path, sizes, fraction):
    counts = {f"c{i:02d}": n for i, n in enumerate(sizes)}
    classes = classes_of(photos(tmp_path / "p", counts))
    found = split(classes, fraction, "stratified")
    assert keys(found.train) | keys(found.test) == {p.key for own in classes for p in own}
    assert not keys(found.train) & keys(found.test)
    for label, count in enumerate(sizes):
        tests = sum(p.label == label for p in found.test)
        expected = 0
        if count >= 3:
            expected = min(max(1, int(fraction * count + 0.5)), count - 1)
        assert tests == expected, (count, tests)


@pytest.mark.parametrize("rule", ["hash", "stratified"])
def test_nothing_and_everything_can_be_asked_for(tmp_path, rule):
    classes = classes_of(photos(tmp_path / "p", {"a": 4, "b": 1}))
    assert split(classes, 0.0, rule).test == [] and split(classes, 1.0, rule).train == []


def test_a_new_photo_moves_at_most_one_other(tmp_path):
    root = photos(tmp_path / "p", {"a": 3, "b": 30})
    before = keys(split(classes_of(root), 0.2, "stratified").test)
    for i in range(100, 140):
        Image.fromarray(content(5000 + i)).resize((40, 40)).save(root / "a" / f"{i}.png")
        after = keys(split(classes_of(root), 0.2, "stratified").test)
        assert len(before - after) <= 1
        assert {k for k in before if k.startswith("b/")} == {k for k in after if k.startswith("b/")}
        before = after
    (root / "b" / "3.png").unlink()
    gone = keys(split(classes_of(root), 0.2, "stratified").test)
    assert len(before - gone) <= 1 and len(gone - before) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_photos_of_the_same_bytes_are_on_one_side(tmp_path, seed):
    root = photos(tmp_path / "p", {"a": 12, "b": 12})
    rng = np.random.default_rng(seed)
    for k in range(8):
        name = "ab"[k % 2]
        source = root / name / f"{rng.integers(12)}.png"
        (root / name / f"copy{seed}{k}.png").write_bytes(source.read_bytes())
    found = split(classes_of(root), 0.3, "stratified")
    train, test = ({p for p in map(bytes_of, part)} for part in found)
    assert test and not train & test


def bytes_of(image: ImageRef):
    with open(image.path, "rb") as file:
        return file.read()


def test_a_photo_in_two_classes_tests_neither(tmp_path):
    root = photos(tmp_path / "p", {"a": 6, "b": 6})
    for i in range(5):
        (root / "b" / f"of a{i}.png").write_bytes((root / "a" / f"{i}.png").read_bytes())
    found = split(classes_of(root), 0.5, "stratified")
    shared = {bytes_of(ImageRef("", str(root / "a" / f"{i}.png"))) for i in range(5)}
    assert not shared & {bytes_of(p) for p in found.test}
    assert {p.label for p in found.test} == {0, 1}  # the sixth photo of a tests


def test_three_photos_of_one_image_are_no_test(tmp_path):
    root = photos(tmp_path / "p", {"a": 1, "b": 5})
    for name in ("x", "y"):
        (root / "a" / f"{name}.png").write_bytes((root / "a/0.png").read_bytes())
    assert {p.label for p in split(classes_of(root), 0.2, "stratified").test} == {1}


def test_a_link_that_leads_nowhere_does_not_stop_the_split(tmp_path):
    root = photos(tmp_path / "p", {"a": 6, "b": 6})
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = split(classes_of(root), 0.2, "stratified")
    assert "a/gone.png" in keys(found.train) | keys(found.test)


def test_recipes_that_were_written_before_split_as_they_did(tmp_path):
    root = photos(tmp_path / "p", {"a": 30, "b": 30, "c": 2})
    spec = recipe.Folders(name="p", root=str(root))
    assert spec.split == "hash"
    loaded = data.load(spec, tmp_path / "cache")
    every = {p.key for own in classes_of(root) for p in own}
    assert keys(loaded.evaluation[0].images) == {k for k in every if draw(k) < 0.2}
    assert keys(loaded.train) == {k for k in every if draw(k) >= 0.2}


# --- what a number is enough for


def test_more_images_tell_a_smaller_loss_until_the_margin():
    assert 0 < enough.loss_told(1) < 100
    told = [enough.loss_told(n) for n in (2, 3, 10, 64, 200, 1000, enough.images_needed())]
    assert told == sorted(told, reverse=True) and all(0 < x <= 100 for x in told)
    assert told[-1] < enough.MARGIN_PP < told[-3]
    assert told[3] == pytest.approx(100 * drop_limits(1, 1, 64).high)
    assert "verdict: no test image" in enough.for_verdict(0)
    assert "are needed" not in enough.for_verdict(enough.images_needed())


# --- init


def init(root, *arguments):
    result = run("init", root, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_init_tests_every_class_and_names_those_that_are_too_small(here):
    counts = {f"c{i:02d}": 3 + i % 3 for i in range(38)} | {"one": 1, "two": 2}
    said = init(photos(here / "shop", counts))
    assert (said["classes"], said["test"]) == (40, 38)
    assert said["train"] == sum(counts.values()) - 38
    assert any(
        "too small to be tested" in x and "'one' (1), 'two' (2)" in x for x in said["enough"]
    )
    spec = recipe.load(here / "shop.yaml").data
    assert (spec.split, spec.license) == ("stratified", "unknown")
    assert "license: unknown      # fill it in" in (here / "shop.yaml").read_text()
    loaded = data.load(spec, here / "cache")
    assert (len(loaded.train), len(loaded.evaluation[0].images)) == (said["train"], said["test"])


def test_init_says_what_the_photos_are_enough_for(here):
    few = init(photos(here / "few", {"a": 5, "b": 9}))["enough"]
    assert few[0].startswith("training: 11 images, 4 to 7 a class (median 5.5); fewer than any")
    assert "enough for no target; too few for onnx-int8 (512)" in few[1]
    assert few[2].startswith("verdict: 3 test images tell a loss of 62.5 points from none; for 1.0")
    many = init(photos(here / "many", {"a": 340, "b": 320}))["enough"]
    assert many[0] == "training: 528 images, 256 to 272 a class (median 264)"
    assert "are enough for onnx-int8, " in many[1] and "too few" not in many[1]
    assert many[2].startswith("verdict: 132 test images tell a loss of ")


def test_init_prints_it_too_and_what_to_do_next(here):
    lines = run("init", photos(here / "few", {"a": 5, "b": 2})).stdout.splitlines()
    assert lines[-1].startswith("few.yaml: 2 classes, 6 photos train and 1 test; next: fill in")
    assert lines[-2].endswith("class 'b' (2)")


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val", "test"), ("train",)])
def test_init_refuses_a_folder_that_is_split_already(here, names):
    for name in names:
        photos(here / "shop" / name, {"cat": 3, "dog": 3})
    before = snapshot(here)
    mistake("init", "shop", says="are parts of a split, not classes")
    same(here, before)


def test_a_class_may_be_called_test_among_others(here):
    assert init(photos(here / "lab", {"test": 3, "tube": 3}))["classes"] == 2


# --- distill: refused before the work


STRATIFIED = "photos, split: stratified"
SEVERAL = {"a": 5, "b": 5, "c": 5, "d": 5}
REFUSED = {
    "one photo": ({"cat": 1}, {}, "has no images to evaluate on (training images: 'cat' (1))"),
    "one class": ({"cat": 40}, {}, "there is one, 'cat': every answer would be right"),
    "one each": ({"a": 1, "b": 1}, {}, "no images to evaluate on (training images: 'a' (1), 'b'"),
    "two each": ({"a": 2, "b": 2}, {}, "has no images to evaluate on (training images: 'a' (2)"),
    "40 of one": (
        {f"c{i:02d}": 1 for i in range(40)},
        {},
        "'c04' (1) and 35 more)",
    ),
    "no offset": (
        SEVERAL,
        {"kl: {weight: 1}": "kl: {weight: 1, offset: true}"},
        "there is no class to set back",
    ),
    "all test": (SEVERAL, {STRATIFIED: STRATIFIED + ", test_fraction: 1.0"}, "0 training images"),
    "none tests": (SEVERAL, {STRATIFIED: STRATIFIED + ", test_fraction: 0.0"}, "to evaluate on"),
    "micro-batches": (
        {"a": 3, "b": 3},
        {"batch_size: 4": "batch_size: 64, accumulate: 8"},
        "images for 8 micro-batches",
    ),
    "one image at a time": (
        {"a": 3, "b": 3},
        {"batch_size: 4": "batch_size: 4, accumulate: 4"},
        "leaves micro-batches of one image, and the batch norm of student.tower needs two",
    ),
    "half a class": (
        {"a": 5, "b": 5, "c": 1, "d": 1},
        {STRATIFIED: STRATIFIED + ", protocol: base_to_novel"},
        "none of a novel class",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_distill_refuses_before_the_work(here, case):
    counts, changes, says = REFUSED[case]
    photos(here / "photos", counts)
    text = RECIPE.replace("ROOT", STRATIFIED)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    write(here, text)
    before = snapshot(here)
    mistake("distill", "r.yaml", says=says, only_line=False)
    same(here, before)


# --- distill: warned of before the work


def warnings_of(here, counts, *changes):
    from edgeclip.host.distill import small_sets

    photos(here / "photos", counts)
    text = RECIPE.replace("ROOT", STRATIFIED)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    asked = recipe.load(write(here, text))
    return small_sets.warnings(data.load(asked.data, here / "cache"), None, asked)


BASE_TO_NOVEL = (STRATIFIED, STRATIFIED + ", protocol: base_to_novel")
PROMPTS = ("losses:", "adapt: {kind: prompts, shots: 4}\nlosses:")
WARNED = {
    "untested class": ({"cat": 40, "dog": 2}, [], "no test image: class 'dog' (2)"),
    "one class tests": ({"cat": 40, "dog": 2}, [], "has images of one class alone (8), 'cat'"),
    "margin": (SEVERAL, [], "verdict: 4 test images tell a loss of"),
    "empty class": ({"a": 5, "b": 5, "c": 0}, [], "no training image: class 'c' (0)"),
    "batch": ({"a": 3, "b": 3}, [("batch_size: 4", "batch_size: 32")], "batch_size is 32, and"),
    "warm-up": (
        {"a": 3, "b": 3},
        [("epochs: 1", "warmup_steps: 2, warmup_batch_size: 64, epochs: 1")],
        "train.warmup_batch_size is 64, and there are 4 training images",
    ),
    "shots": (SEVERAL | {"b": 3}, [PROMPTS], "adapt.shots is 4, and some classes have fewer"),
    "own list of one": ({"a": 5, "b": 5}, [BASE_TO_NOVEL], "'novel' has one class"),
    "parts": ({"train": 5, "test": 5}, [], "have the names of parts of a split"),
}


@pytest.mark.parametrize("case", WARNED)
def test_distill_warns_of(here, case):
    counts, changes, says = WARNED[case]
    found = warnings_of(here, counts, *changes)
    assert any(says in line for line in found), found


def test_a_set_that_is_large_enough_is_not_warned_of(here, monkeypatch):
    monkeypatch.setattr(enough, "images_needed", lambda: 8)
    assert warnings_of(here, {"a": 20, "b": 20}) == []


def test_the_warning_comes_before_the_work_and_the_work_is_done(here):
    photos(here / "photos", {"cat": 5, "dog": 2})
    write(here, RECIPE.replace("ROOT", STRATIFIED))
    done = run("distill", "r.yaml")
    assert done.exit_code == 0, done.output
    warned = done.stderr.index("warning: no test image: class 'dog' (2)")
    assert warned < done.stderr.index("teacher cache")

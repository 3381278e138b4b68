"""What cannot be known is not certified: a set is unseen where its images were compared with the
training images, whatever its name is.
"""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from edgeclip import disk
from edgeclip.device.evaluation import EvaluationSet as KeptSet
from edgeclip.device.evaluation import load_evaluation, unseen_places
from edgeclip.device.images import ImageRef, digest, index_folder, index_tar
from edgeclip.errors import EdgeclipError
from edgeclip.host.data import EvaluationSet, split
from edgeclip.host.evaluation import overlap
from tests.support.command import run
from tests.support.files import write
from tests.support.images import add_member
from tests.support.tiny_recipe import RECIPE


def photo(seed, width=240, height=180):
    """Shapes on a ground with a grain, in which any two seeds differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    grain = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def saved(image, kind="JPEG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def half(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def turned(image):
    """As a phone stores it: on its side, with a note to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image.transpose(Image.Transpose.ROTATE_90), quality=92, exif=exif)


COPIES = {
    **{f"JPEG {q}": lambda p, q=q: saved(p, quality=q) for q in (60, 70, 80, 95)},
    "PNG": lambda p: saved(p, "PNG"),
    "WebP": lambda p: saved(p, "WEBP", quality=75),
    "half": lambda p: saved(half(p), quality=90),
    "half, JPEG 60": lambda p: saved(half(p), quality=60),
    "twice the size": lambda p: saved(p.resize((480, 360)), quality=85),
    "squashed": lambda p: saved(p.resize((224, 224)), quality=85),
    "palette": lambda p: saved(p.quantize(256), "PNG"),
    "transparent": lambda p: saved(p.convert("RGBA"), "PNG"),
    "turned by EXIF": turned,
}


def folder_of(path, contents):
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return index_folder(path)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "a"
    images = folder_of(folder, {f"{i}.jpg": saved(photo(i), quality=92) for i in range(40)})
    return images, overlap.hash_images(images, "training")[1]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found_however_it_was_saved_again(training, tmp_path, copy):
    names = {f"copy{i}.jpg": COPIES[copy](photo(i)) for i in range(12)}
    names |= {f"other{i}.jpg": COPIES[copy](photo(1000 + i)) for i in range(12)}
    images = folder_of(tmp_path / "b", names)
    found = overlap.compare(images, training[1], copy)
    assert found.training == 40 and found.identical == ()
    assert [images[i].key for i in found.alike] == sorted(n for n in names if n.startswith("copy"))


def test_the_same_bytes_are_found_under_any_name_and_in_a_shard(training, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in (3, 500, 7):
            add_member(tar, f"x{i}.jpg", saved(photo(i), quality=92))
            add_member(tar, f"x{i}.cls", b"0")
    found = overlap.compare(index_tar(tmp_path / "0.tar"), training[1], "shard")
    assert (found.identical, found.alike, found.places) == ((0, 2), (), (0, 2))


def test_no_two_different_images_are_taken_for_one(training):
    images, hashes = training
    for i, image in enumerate(images):
        rest = overlap.Hashes(*(np.delete(column, i, axis=0) for column in hashes))
        assert overlap.compare([image], rest, "rest").places == ()


def test_one_color_apart_is_another_image(tmp_path):
    """A pHash knows no level: every flat image has one."""
    flat = [saved(Image.new("RGB", (90, 90), (level,) * 3), "PNG") for level in (40, 60, 200)]
    images = folder_of(tmp_path / "flat", {f"{i}.png": content for i, content in enumerate(flat)})
    _, hashes = overlap.hash_images(images[:1], "flat")
    assert overlap.compare(images, hashes, "flat").identical == (0,)
    assert overlap.compare(images, hashes, "flat").alike == ()


def test_hashes_are_kept_once_and_a_change_is_noticed(training, tmp_path):
    images, hashes = training
    assert overlap.load(tmp_path) is None
    overlap.keep(tmp_path, [images[:30], images[30:]], threads=1)
    gone = [ImageRef("gone", str(tmp_path / "gone.jpg"))]
    again = overlap.keep(tmp_path, [gone], threads=1)  # nothing is read a second time
    for column, kept in zip(hashes, again, strict=True):
        np.testing.assert_array_equal(column, kept)
    path = tmp_path / overlap.FOLDER / "content.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EdgeclipError):
        overlap.load(tmp_path)


def test_a_million_images_take_eighty_megabytes(training):
    assert sum(column.nbytes for column in training[1]) == 80 * 40


def test_an_unreadable_image_is_neither_here_nor_there(training, tmp_path):
    images = folder_of(tmp_path / "b", {"0.jpg": b"no image", "1.jpg": saved(photo(5), quality=92)})
    assert overlap.compare(images, training[1], "b").identical == (1,)


def test_what_was_not_compared_is_not_called_unseen():
    s = EvaluationSet("a", [], [0], "its own")
    assert overlap.told(s).startswith("not known whether the student saw its images")
    kept = KeptSet(name="a", note="", rows=[0], classes=[0], role="unseen")
    assert "unseen" not in kept.told and "not compared" in kept.told
    compared = KeptSet(name="a", note="", rows=[0], classes=[0], role="unseen", compared=True)
    assert compared.told == "unseen"


# --- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with 4 of 12 test photos among its training photos: 3 by bytes, 1 saved again."""
    here = tmp_path_factory.mktemp("run")
    of = {"train": [], "test": []}
    for name in ("cat", "dog"):
        (here / "photos" / name).mkdir(parents=True)
        draws = {i: split.draw(f"{name}/{i}.jpg") for i in range(200)}
        tests = [i for i, x in draws.items() if x < 0.2][:6]
        trains = [i for i, x in draws.items() if x >= 0.2][:10]
        for i in tests + trains:
            seed = i + 1000 * (name == "dog")
            path = here / "photos" / name / f"{i}.jpg"
            path.write_bytes(saved(photo(seed, 64, 64), quality=92))
            of["test" if i in tests else "train"].append(path)
    for k in range(3):
        shutil.copy(of["train"][k], of["test"][k])
    with Image.open(of["train"][5]) as image:
        of["test"][4].write_bytes(saved(image, quality=80))
    write(here, RECIPE.replace("ROOT", "photos"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done = run("distill", "r.yaml", "--json")
        assert done.exit_code == 0, done.output
        yield here, of, json.loads(done.stdout), done.stderr


def test_distill_names_the_test_images_that_it_trained_on_before_the_work(finished):
    _, of, results, stderr = finished
    (row,) = results["sets"]
    said = "3 of 12 images are byte-identical to training images and 1 look like re-encoded ones"
    assert said in row["note"] and "not counted as unseen" in row["note"]
    assert (
        "compared with 20 training images by bytes, and by a 64-bit perceptual hash" in row["note"]
    )
    (line,) = [line for line in stderr.splitlines() if said in line]
    assert stderr.index(line) < stderr.index("teacher cache")
    first = [f"cat/{path.name}" for path in of["test"][:5]]
    assert sorted(row["overlap"]["first"]) == sorted(first[:3] + first[4:])
    assert (row["overlap"]["training_images"], row["overlap"]["identical"]) == (20, 3)
    assert row["images"] == 12  # none is dropped from what was asked for
    assert row["student_on_unseen"]["top1"] is not None


def test_the_gates_sample_has_unseen_images_alone(finished):
    here, of, _, _ = finished
    evaluation = load_evaluation(here / "runs/r/evaluation")
    own, leaked = evaluation.sets
    assert (own.role, own.compared, len(own.rows)) == ("unseen", True, 8)
    assert leaked.name == "shop test, among the training images"
    assert (leaked.role, leaked.unseen, len(leaked.rows)) == ("trained with names", False, 4)
    assert unseen_places(evaluation).tolist() == sorted(own.rows)
    trained = {digest(ImageRef(p.name, str(p))) for p in of["train"]}
    kept = index_tar(here / "runs/r/evaluation/images.tar")
    assert not {digest(kept[i]) for i in own.rows} & trained
    held_out = disk.read_json(here / "runs/r/evaluation/evaluation.json")["held_out"]
    assert len(held_out) == 8 and not set(held_out) & trained


def evaluate(*arguments):
    result = run("evaluate", "runs/r", "--protocol", "zero_shot", *arguments, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["sets"]
    return row


def other_set(here, name, contents):
    for i, content in enumerate(contents):
        path = here / name / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    block = f"{{kind: folders, name: {name}, root: {name}, test_fraction: 1.0}}"
    return write(here, f"data: {block}\n", f"{name}.yaml")


def test_another_name_does_not_make_a_set_unseen(finished):
    here, of, _, _ = finished
    contents = [path.read_bytes() for path in of["train"][:3]]
    contents += [saved(half(photo(9000 + i, 64, 64))) for i in range(3)]
    row = evaluate("--data", other_set(here, "elsewhere", contents))
    assert row["transductive"] is True and row["overlap"]["identical"] == 3
    assert row["note"].startswith("transductive: ")
    assert "3 of 6 images are byte-identical" in row["note"]


def test_what_is_new_is_called_so_with_what_it_was_compared_with(finished):
    here, _, _, _ = finished
    row = evaluate("--data", other_set(here, "new", [saved(photo(8000 + i)) for i in range(4)]))
    assert row["transductive"] is False and row["note"].startswith("not transductive: ")
    assert "none of its 4 images is among the training images (compared with 20" in row["note"]
    assert row["student_on_unseen"] is None  # they all are


def test_a_run_without_hashes_claims_nothing(finished, tmp_path, monkeypatch):
    here, of, _, _ = finished
    shutil.copytree(here, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    shutil.rmtree("runs/r/training_images")
    path = other_set(tmp_path / "old", "copied", [p.read_bytes() for p in of["train"][:4]])
    row = evaluate("--data", path)
    assert row["transductive"] is None and row["overlap"] is None
    assert "not known whether the student saw its images" in row["note"]
    assert "unseen" not in row["note"] and "not transductive" not in row["note"]


def test_an_image_that_only_shares_its_name_is_no_copy(finished):
    here, of, _, _ = finished
    names = [saved(photo(7000 + i)) for i in range(len(of["train"][:4]))]
    assert evaluate("--data", other_set(here, "same_names", names))["overlap"]["identical"] == 0

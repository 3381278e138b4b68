"""Bad input, kind by kind as the issue lists it: one line, exit 1, nothing half-written."""

import itertools

import pytest

from edgeclip.device.bundle import Bundle
from tests.support.command import mistake, run
from tests.support.files import same, snapshot, write
from tests.support.images import photos, truncated_jpeg
from tests.support.tiny_recipe import RECIPE


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("losses", "losess", "did you mean 'losses'"),
        ("batch_size: 4", "batch_siz: 4", "did you mean 'batch_size'"),
        ("projector_hidden", "projector_hiden", "did you mean 'projector_hidden'"),
    ],
)
def test_an_unknown_yaml_key(here, old, new, says):
    write(here, RECIPE.replace(old, new).replace("ROOT", "x"))
    before = snapshot(here)
    mistake("distill", "r.yaml", says=says)
    same(here, before)


def test_an_unknown_key_in_a_target_and_a_device(here, shipped_bundle):
    write(here, "runtime: onnxruntime\nprecison: fp32\n", "t.yaml")
    write(here, "runtimes: [onnxruntime]\nthread: 1\n", "d.yaml")
    mistake(
        "export",
        "--target",
        "t.yaml",
        "--model",
        "mobileone_s0",
        "--weights",
        "random",
        says="did you mean 'precision'",
    )
    for command in ("validate", "bench"):
        mistake(
            command,
            "--bundle",
            shipped_bundle("onnx-fp32"),
            "--device",
            "d.yaml",
            says="did you mean 'threads'",
        )
    assert snapshot(here).keys() == {"t.yaml", "d.yaml"}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("epochs: 1", "epochs: many", "train.epochs"),
        ("projector_hidden: null", "projector_hidden: 1.5", "student.projector_hidden"),
        ("weight: 1", "weight: [1]", "losses.kl.weight"),
    ],
)
def test_a_wrong_type(here, old, new, field):
    write(here, RECIPE.replace(old, new).replace("ROOT", "x"))
    before = snapshot(here)
    mistake("distill", "r.yaml", says=field)
    same(here, before)


def test_a_missing_file(here, cat, shipped_bundle):
    bundle, before = shipped_bundle("onnx-fp32"), snapshot(here)
    mistake("distill", "nothing.yaml", says="nothing.yaml: there is no such file")
    mistake(
        "classify", "nothing.jpg", "--bundle", bundle, says="nothing.jpg: there is no such file"
    )
    mistake("embed", cat, "nothing.jpg", "--out", "f.npy", "--bundle", bundle, says="nothing.jpg")
    for command in ("validate", "bench"):
        mistake(command, "--bundle", "nothing", says="nothing: there is no such folder")
        mistake(command, "--run", "nothing", says="nothing: there is no such run")
    mistake("classify", cat, says="runs/latest")
    mistake("report", "nothing", says="nothing")
    mistake(
        "labels", bundle, "@nothing.txt", "--out", "b", says="nothing.txt: there is no such file"
    )
    mistake("init", "nothing", says="nothing: there is no such folder")
    mistake(
        "export", "--target", "onnx-fp32", "--run", "nothing", says="nothing: there is no such run"
    )
    mistake(
        "export",
        "--target",
        "onnx-fp32",
        "--model",
        "mobileone_s0",
        "--weights",
        "nothing.pt",
        says="nothing.pt: there is no such weights file",
    )
    same(here, before)


def test_missing_data(here):
    write(here, RECIPE.replace("ROOT", "nowhere"))
    before = snapshot(here)
    mistake("distill", "r.yaml", says="nowhere: there is no such folder", only_line=False)
    same(here, before)


def test_a_truncated_image(here, shipped_bundle):
    truncated_jpeg(here / "half.jpg")
    bundle, before = shipped_bundle("onnx-fp32"), snapshot(here)
    mistake("classify", "half.jpg", "--bundle", bundle, says="half.jpg: unreadable image")
    mistake(
        "embed",
        "half.jpg",
        "--out",
        "f.npy",
        "--bundle",
        bundle,
        says="half.jpg: unreadable image",
    )
    same(here, before)


def test_a_truncated_image_in_twenty_fails_the_run(here):
    truncated_jpeg(photos(here / "photos") / "cat" / "half.jpg")
    write(here, RECIPE.replace("ROOT", "photos"))
    before = snapshot(here)
    mistake("distill", "r.yaml", says="half.jpg", only_line=False)
    left = {
        k for k in snapshot(here).keys() - before.keys() if k.split("/")[0] not in ("runs", "cache")
    }
    assert not left and not [
        k for k in snapshot(here) if k.startswith("cache/") or ".tmp" in k or "/student" in k
    ]


def test_an_empty_class_list(here, own_bundle):
    bundle = own_bundle("onnx-fp32")
    write(here, "\n \n", "words.txt")
    (here / "photos").mkdir()
    write(here, RECIPE.replace("ROOT", "photos"))
    before, bundle_before = snapshot(here), snapshot(bundle)
    mistake("labels", bundle, "@words.txt", says="words.txt: is empty")
    mistake(
        "export",
        "--target",
        "onnx-fp32",
        "--model",
        "mobileone_s0",
        "--weights",
        "random",
        "--labels",
        "@words.txt",
        says="words.txt: is empty",
    )
    mistake("init", "photos", says="empty class list")
    mistake("distill", "r.yaml", says="the class list is empty", only_line=False)
    same(here, before)
    same(bundle, bundle_before)


def test_a_file_of_labels_that_is_no_text(here, own_bundle):
    bundle = own_bundle("onnx-fp32")
    (here / "words.txt").write_bytes("Äpfel\n".encode("cp1252"))
    mistake("labels", bundle, "@words.txt", says="words.txt: line 1: byte 0xc4 is not UTF-8")
    mistake("labels", bundle, "@.", says=".: cannot be read (Is a directory)")
    (here / "words.txt").write_bytes("\ufeffpear\nplum\n".encode())
    assert run("labels", bundle, "@words.txt", "--in-place").exit_code == 0 and Bundle.load(
        bundle
    ).labels == [
        "pear",
        "plum",
    ]


def test_labels_are_not_baked_over_somebodys_folder(here, shipped_bundle):
    (here / "keep").mkdir()
    write(here / "keep", "precious", "thesis.txt")
    write(here, "pear\n", "words.txt")
    before = snapshot(here)
    mistake(
        "labels", shipped_bundle("onnx-fp32"), "@words.txt", "--out", "keep", says="is not replaced"
    )
    same(here, before)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("dog", "Cat ", "classes 'Cat ' and 'cat'"),
        ("dog", "dog " + 9 * "very ", "class 'dog very very"),
    ],
)
def test_class_names_that_the_text_tower_cannot_tell_apart_or_take(here, old, new, says):
    (photos(here / "photos") / old).rename(here / "photos" / new)
    write(here, RECIPE.replace("ROOT", "photos"))
    before = snapshot(here)
    mistake("distill", "r.yaml", says=says, only_line=False)
    same(here, before)


@pytest.mark.parametrize("half", ["base", "novel"])
def test_a_split_with_an_empty_half(here, half):
    for p in (photos(here / "photos") / ("cat" if half == "base" else "dog")).iterdir():
        p.unlink()
    write(here, RECIPE.replace("ROOT", "photos, protocol: base_to_novel"))
    before = snapshot(here)
    mistake(
        "distill",
        "r.yaml",
        says=f"there are training images, but none of a {half} class",
        only_line=False,
    )
    same(here, before)


@pytest.mark.parametrize("left", [0, 1])
def test_a_data_set_of_hardly_any_training_images(here, left):
    from hashlib import sha256

    from edgeclip.device.images import index_folder

    drawn = sorted(
        int(sha256(f"{f.name}/{p.key}".encode()).hexdigest()[:8], 16) / 2**32
        for f in photos(here / "photos").iterdir()
        for p in index_folder(f)
    )
    write(
        here,
        RECIPE.replace(
            "ROOT", f"photos, test_fraction: {drawn[-left] if left else (1 + drawn[-1]) / 2}"
        ),
    )
    before = snapshot(here)
    mistake("distill", "r.yaml", says=f"the data has {left} training images", only_line=False)
    same(here, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_the_last_good_epoch_is_kept(here, monkeypatch, value):
    from edgeclip.host import student as students
    from edgeclip.host.distill import losses

    photos(here / "photos")
    write(here, RECIPE.replace("ROOT", "photos").replace("epochs: 1", "epochs: 3"))
    kl, calls = losses.LOSSES["kl"], itertools.count()
    with monkeypatch.context() as patch:
        patch.setitem(
            losses.LOSSES, "kl", lambda *a: kl(*a) * (value if next(calls) == 4 else 1.0)
        )  # 3 steps an epoch
        mistake("distill", "r.yaml", says=f"step 4: loss 'kl' is {value}", only_line=False)
    *_, description = students.load(here / "runs/r/student.partial")
    assert [row["epoch"] for row in description["log"]] == [1] and not (
        here / "runs/r/student"
    ).exists()
    assert run("distill", "r.yaml").exit_code == 0
    assert (here / "runs/r/student").exists() and not (here / "runs/r/student.partial").exists()


def test_a_finite_loss_whose_gradient_is_not_is_never_kept(here, monkeypatch):
    from edgeclip.host.distill import losses

    photos(here / "photos")
    write(here, RECIPE.replace("ROOT", "photos"))
    kl, calls = losses.LOSSES["kl"], itertools.count()

    def broken(batch, spec):
        zero = 0.0 * batch.image_features
        # in the epoch's last step: the square root's slope at 0 is infinite, and infinity times 0
        # is no number
        return kl(batch, spec) + (zero.sqrt() if next(calls) == 2 else zero).sum()

    monkeypatch.setitem(losses.LOSSES, "kl", broken)
    mistake("distill", "r.yaml", says="end of epoch 1: weight '", only_line=False)
    assert not list((here / "runs/r").glob("student*"))


def test_an_unknown_target_or_device_name(here, shipped_bundle):
    mistake(
        "export",
        "--target",
        "onnx-int9",
        "--model",
        "mobileone_s0",
        "--weights",
        "random",
        says="did you mean 'onnx-int8'",
    )
    mistake(
        "validate",
        "--device",
        "host-cpuu",
        "--bundle",
        shipped_bundle("onnx-fp32"),
        says="did you mean 'host-cpu'",
    )
    mistake(
        "bench",
        "--device",
        "host-cpuu",
        "--bundle",
        shipped_bundle("onnx-fp32"),
        says="did you mean 'host-cpu'",
    )
    mistake("doctor", "--device", "pocket-calculator", says="known: ")
    mistake(
        "export",
        "--target",
        "onnx-fp32",
        "--model",
        "no-such-net",
        "--weights",
        "random",
        says="neither an open_clip nor a timm model",
    )
    assert snapshot(here) == {}


def test_a_run_folder_that_is_something_else_is_left_alone(here):
    photos(here / "photos")
    write(here, RECIPE.replace("ROOT", "photos"))
    (here / "mine").mkdir()
    write(here / "mine", "precious", "notes.txt")
    for extra in ([], ["--fresh"]):
        before = snapshot(here)
        mistake("distill", "r.yaml", "--out", "mine", *extra, says="is not empty and not a run")
        same(here, before)


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "soon"])
def test_a_time_that_is_none_is_refused(minutes):
    result = run("bench", "--minutes", minutes)
    assert result.exit_code == 2 and "'--minutes'" in result.stderr

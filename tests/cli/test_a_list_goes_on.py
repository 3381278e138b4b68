"""Over many images one that cannot be read is skipped, named and counted, and ends nothing."""

import json
import shutil

import numpy as np
import pytest

from edgeclip.device.bundle import Bundle
from tests.support.command import mistake, run
from tests.support.files import same, snapshot
from tests.support.images import encoded, toy_image, truncated_jpeg


@pytest.fixture
def many(here):
    """Twelve images of which three are damaged, each in another way; names of the good ones."""
    good = []
    for i in range(12):
        name = f"{i:02d}.png"
        (here / name).write_bytes(encoded(toy_image(i)))
        good.append(name)
    (here / "03.png").write_bytes(b"")
    (here / "07.png").write_bytes(encoded(toy_image(7))[:60])
    truncated_jpeg(here / "12.jpg")
    return [name for name in good if name not in ("03.png", "07.png")]


NAMES = [f"{i:02d}.png" for i in range(12)] + ["12.jpg"]


def test_classify(many, shipped_bundle):
    bundle = shipped_bundle("onnx-fp32")
    result = run("classify", *NAMES, "--bundle", bundle, "--json")
    assert result.exit_code == 0
    answers = json.loads(result.stdout)
    assert list(answers) == NAMES
    assert [name for name in NAMES if answers[name] is not None] == many
    assert "3 of 13 images skipped" in result.stderr
    for name in ("03.png", "07.png", "12.jpg"):
        assert f"skipped: {name}: unreadable image" in result.stderr
    alone = run("classify", many[-1], "--bundle", bundle, "--json")
    assert json.loads(alone.stdout)[many[-1]] == answers[many[-1]]

    table = run("classify", *NAMES, "--bundle", bundle).stdout
    assert [name for name in NAMES if f"{name}\n" in table] == many


def test_embed(here, many, shipped_bundle):
    bundle = shipped_bundle("onnx-fp32")
    result = run("embed", *NAMES, "--out", "f.npy", "--bundle", bundle, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["images"] == many and set(told["skipped"]) == set(NAMES) - set(many)
    rows = np.load("f.npy")
    assert told["shape"] == list(rows.shape)
    assert np.array_equal(rows, Bundle.load(bundle).encode_image(many))


def test_where_none_can_be_read_nothing_is_written(here, many, shipped_bundle):
    bundle, before = shipped_bundle("onnx-fp32"), snapshot(here)
    for command in (("classify",), ("embed", "--out", "f.npy")):
        mistake(
            *command, "03.png", "12.jpg", "--bundle", bundle, says="unreadable", only_line=False
        )
        mistake(*command, "03.png", "--bundle", bundle, says="03.png: unreadable image")
    same(here, before)


def test_a_missing_image_and_a_folder_are_mistakes_not_damage(here, many, shipped_bundle):
    bundle, before = shipped_bundle("onnx-fp32"), snapshot(here)
    (here / "folder").mkdir()
    for command in (("classify",), ("embed", "--out", "f.npy")):
        mistake(*command, "00.png", "gone.png", "--bundle", bundle, says="gone.png: there is no")
        mistake(*command, "00.png", "folder", "--bundle", bundle, says="folder: is a folder")
    shutil.rmtree(here / "folder")
    same(here, before)

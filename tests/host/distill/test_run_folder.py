"""A finished run: where it lies, where its data lie now, and what it says of images that were held
out.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from edgeclip import disk
from edgeclip.device.images import digest
from edgeclip.host import data, recipe
from edgeclip.host.export.source import from_run
from tests.support.command import mistake, run
from tests.support.files import snapshot, write
from tests.support.images import toy_image
from tests.support.tiny_recipe import RECIPE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    for label in ("apple", "pear"):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(15):
            toy_image(i + 1000 * (label == "pear")).save(folder / "photos" / label / f"{i}.png")
    write(folder, RECIPE.replace("ROOT", "photos") + "parity: {max_images: 2}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run("distill", "r.yaml", "--json")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy that a test may change."""
    folder = shutil.copytree(made, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_a_finished_run_learns_where_its_data_moved(place):
    (place / "photos").rename(place / "moved")
    message = mistake(
        "distill", "r.yaml", "--data", "elsewhere", says="no such folder", only_line=False
    )
    assert "--data NAME=DIR" in message
    # Its roots are those of the folder that was copied; nothing lies there for a run whose data
    # have gone.
    disk.write_json(place / "runs/r/roots.json", {"data": str(place / "photos")})
    with pytest.raises(
        recipe.EdgeclipError,
        match=r"photos: there is no such folder.*edgeclip distill runs/r/recipe.yaml --out runs/r --data shop=DIR",
    ):
        from_run(Path("runs/r")).calibration()
    assert (
        run("distill", "runs/r/recipe.yaml", "--out", "runs/r", "--data", "shop=moved").exit_code
        == 0
    )
    assert disk.read_json(place / "runs/r/roots.json") == {"data": str(place / "moved")}
    assert len(from_run(place / "runs/r").calibration()) > 20
    assert run("distill", "r.yaml").exit_code == 0  # it says nothing of where they lie
    assert disk.read_json(place / "runs/r/roots.json") == {"data": str(place / "moved")}


def test_a_run_by_its_link_or_from_inside_is_that_run(place, monkeypatch):
    results = disk.read_json(place / "runs/r/results.json")
    assert json.loads(run("distill", "r.yaml", "--out", "runs/latest", "--json").stdout) == results
    assert os.readlink(place / "runs/latest") == "r"
    result = run("distill", "r.yaml", "--out", "runs/latest", "--fresh")
    assert result.exit_code == 0, result.output
    assert os.readlink(place / "runs/latest") == "r" and (place / "runs/r" / disk.MANIFEST).exists()
    monkeypatch.chdir(place / "runs/r")
    assert run("distill", "recipe.yaml", "--out", ".").exit_code == 0
    assert os.readlink(place / "runs/latest") == "r"
    mistake("distill", "recipe.yaml", "--out", ".", "--fresh", says="--fresh deletes it")


def test_fresh_by_the_runs_own_recipe(place):
    result = run("distill", "runs/r/recipe.yaml", "--out", "runs/r", "--fresh")
    assert result.exit_code == 0, result.output
    assert (place / "runs/r/recipe.yaml").read_text() == (place / "r.yaml").read_text()


def test_what_a_kill_after_the_student_left_is_removed(place):
    here = place / "runs/r"
    whole = snapshot(here)
    (here / disk.MANIFEST).unlink()
    for name in ("student.partial", "checkpoint/000000003", "checkpoint_quantized"):
        (here / name).mkdir(parents=True)
        (here / name / "state.json").write_text("{}")
    assert run("distill", "r.yaml").exit_code == 0
    assert snapshot(here).keys() == whole.keys()


def test_what_was_measured_before_outlives_a_fresh_start(place):
    reports = place / "runs/r/reports"
    for name in ("t.host-cpu.history.json", "t.host-cpu.answers.json", "t.host-cpu.parity.json"):
        disk.write_sealed(reports / name, {"entries": []})
    result = run("distill", "r.yaml", "--fresh")
    assert result.exit_code == 0, result.output
    left = sorted(path.name for path in reports.iterdir() if path.name.startswith("t."))
    assert left == ["t.host-cpu.answers.json", "t.host-cpu.history.json"]
    # A process that was killed after it had removed the recipe left that alone.
    for path in (place / "runs/r").iterdir():
        if path != reports:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("distill", "r.yaml").exit_code == 0
    shutil.rmtree(place / "runs/r")
    (reports).mkdir(parents=True)
    (reports / "mine.txt").write_text("not edgeclip's")
    mistake("distill", "r.yaml", says="is not empty and not a run")


def test_a_runs_evaluation_images_keep_their_slices(place):
    for label in ("apple", "pear"):
        (place / "photos" / label / "night").mkdir()
        for i in range(0, 15, 2):
            moved = place / "photos" / label / "night" / f"{i}.png"
            (place / "photos" / label / f"{i}.png").rename(moved)
    text = (place / "r.yaml").read_text().replace("max_images: 2", "max_images: 100")
    write(place, text, "more.yaml")
    result = run("distill", "more.yaml", "--out", "runs/more")
    assert result.exit_code == 0, result.output
    (test,) = data.load(recipe.load(place / "more.yaml").data, place / "cache").evaluation
    kept = disk.read_json(place / "runs/more/evaluation/evaluation.json")["slices"]
    assert kept == [list(image.slices) for image in test.images]
    assert ["folder: night"] in kept


def test_every_held_out_image_is_known_however_few_are_kept(place):
    (test,) = data.load(recipe.load(place / "r.yaml").data, place / "cache").evaluation
    assert (
        len(disk.read_json(place / "runs/r/evaluation/evaluation.json")["labels"])
        == 2
        < len(test.images)
    )
    assert from_run(place / "runs/r").evaluation_hashes() == {digest(p) for p in test.images}


READS = {
    "distill": ["distill", "r.yaml"],
    "export": ["export", "--run", "runs/r", "--target", "onnx-fp32"],
    "evaluate": ["evaluate", "runs/r", "--protocol", "zero_shot"],
    "validate": ["validate", "--run", "runs/r"],
    "bench": ["bench", "--run", "runs/r"],
    "report": ["report", "runs/r"],
}


@pytest.mark.parametrize("command", list(READS))
def test_a_run_that_is_written_is_read_by_nobody(place, command):
    with disk.locked(place / "runs/r"):
        mistake(*READS[command], says="runs/r: is in use by ", only_line=False)
    assert not (place / "runs/.r.lock").exists()


def test_a_run_that_is_read_or_has_a_bundle_that_is_written_is_not_started_over(place):
    before = snapshot(place / "runs/r")
    with disk.shared(place / "runs/r"):
        mistake("distill", "r.yaml", "--fresh", says="is in use by ", only_line=False)
    bundle = place / "runs/r/bundles/b"
    with disk.new_folder(bundle) as folder:
        disk.write_manifest(folder, "bundle", {})
    with disk.locked(bundle):
        mistake("distill", "r.yaml", "--fresh", says="bundles/b: is in use by ", only_line=False)
    shutil.rmtree(place / "runs/r/bundles")
    assert snapshot(place / "runs/r") == before

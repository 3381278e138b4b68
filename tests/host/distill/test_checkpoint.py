"""A run that is killed and started again ends with the weights of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from edgeclip import disk
from edgeclip.errors import Interrupted
from edgeclip.host.data import shapes
from edgeclip.host.distill import checkpoint
from edgeclip.host.distill.step import Step
from tests.support.files import REPO
from tests.support.toy_training import run

EVERYTHING = {
    "kl": {},
    "if_align": {"weight": 10, "momentum": 0.5},
    "edu_attention": {"learn_temperature": True},
    "masked_feature": {"patch": 4},
    "interactive": {},
    "augmented_feature": {},
    "vrd": {},
}
CASES = {
    "every kind of state": {"losses": EVERYTHING, "kind": "dropout", "text": True},
    "sgd, batch norm, first training": {
        "losses": {"kl": {}},
        "kind": "batch norm",
        "optimizer": "sgd",
        "pretrain": {"epochs": 1},
    },
    "parts, fp16": {
        "losses": EVERYTHING,
        "kind": "dropout",
        "accumulate": 2,
        "precision": "fp16",
        "weight_decay_of": "matrices",
    },
    "mean of the last weights, clipped": {
        "losses": EVERYTHING,
        "kind": "batch norm",
        "average_last": 0.5,
        "max_grad_norm": 0.1,
    },
    "no projector steps": {"losses": {"kl": {}}, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.mark.parametrize("name", list(CASES))
def test_interrupted_after_every_single_step(folder, tmp_path, monkeypatch, name):
    case = CASES[name]
    steps, weights, log = run(folder, **case)
    step, number = Step.__call__, iter([signal.SIGINT, signal.SIGTERM] * 20)

    def interrupted(self, *arguments):
        said = step(self, *arguments)
        signal.raise_signal(next(number))
        return said

    monkeypatch.setattr(Step, "__call__", interrupted)
    for done in range(1, 100):
        try:
            _, resumed, resumed_log = run(folder, checkpoints=tmp_path, **case)
            break
        except Interrupted as e:
            assert e.number in (
                signal.SIGINT,
                signal.SIGTERM,
            ) and f"step {done} is finished and saved" in str(e)
            assert [p.name for p in tmp_path.iterdir()] == [
                f"{done:09d}"
            ]  # the older ones are gone
    assert done == len(steps) + 1 and log == resumed_log
    assert weights.keys() == resumed.keys() and all(
        torch.equal(weights[k], resumed[k]) for k in weights
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # keep the older ones
    case = {"losses": {"kl": {}}, "checkpoint_every": 1}
    _, weights, _ = run(folder, checkpoints=tmp_path, **case)
    newest = sorted(p for p in tmp_path.iterdir() if not p.name.startswith("."))[-1]
    content = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(content[:-4] + b"\0\0\0\1")
    _, again, _ = run(folder, checkpoints=tmp_path, **case)
    assert "checkpoint skipped" in capsys.readouterr().err and all(
        torch.equal(weights[k], again[k]) for k in weights
    )


def test_a_half_written_checkpoint_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "none") is None
    (tmp_path / "000000007").mkdir()
    disk.write_json(tmp_path / "000000007" / "state.json", {})
    assert checkpoint.load(tmp_path) is None


def test_the_second_signal_acts_at_once():
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a test run in the background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt), checkpoint.signals() as noted:
            signal.raise_signal(signal.SIGINT)
            assert noted == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


# --- the command itself, killed


KILLS = [(3, "KILL"), (7, "TERM"), (10, "INT"), (12, "KILL"), (14, "TERM"), (16, "INT")]
"""After so many steps of all; the first 8 are the projector's."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("kill")
    shapes.write(place / ".data" / "shapes")
    recipe = yaml.safe_load((REPO / "recipes" / "smoke.yaml").read_text())
    recipe |= {
        "other_teachers": [],
        "views": {"count": 1},
        "losses": {
            "kl": {},
            "if_align": {"momentum": 0.5},
            "edu_attention": {},
            "masked_feature": {},
        },
    }
    recipe["train"] |= {"warmup_steps": 8, "lr": 1e-3, "checkpoint_every": 1}
    (place / "r.yaml").write_text(json.dumps(recipe))
    return place


def started(place, out):
    command = [sys.executable, "-m", "edgeclip", "distill", "r.yaml", "--out", f"runs/{out}"]
    return subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )


def steps_done(place, out):
    return max(
        (int(p.name) for p in (place / "runs" / out / "checkpoint").glob("[0-9]*")), default=0
    )


@pytest.mark.slow
def test_killed_again_and_again_in_both_phases(workplace):
    whole = started(workplace, "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    for steps, kind in KILLS:
        number = getattr(signal, f"SIG{kind}")
        process = started(workplace, "killed")
        while steps_done(workplace, "killed") < steps and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        if kind == "KILL":
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, errors
            assert (
                "is finished and saved in" in errors.splitlines()[-1]
                and "the same command goes on from there" in errors.splitlines()[-1]
            )
        assert steps_done(workplace, "killed") >= steps
    last = started(workplace, "killed")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    a, b = (
        load_file(workplace / "runs" / out / "student" / "student.safetensors")
        for out in ("whole", "killed")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [
        json.loads((workplace / "runs" / out / "results.json").read_text())["log"]
        for out in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and not (workplace / "runs/killed/checkpoint").exists()


def test_a_changed_recipe_on_resume_is_refused_with_the_difference(workplace):
    recipe = json.loads((workplace / "r.yaml").read_text())
    recipe["train"]["accumulate"] = 2
    disk.write_json(
        workplace / "runs/stopped/roots.json",
        {"data": ".data/shapes", "evaluation_data": ".data/shapes"},
    )
    from edgeclip.host import recipe as R

    disk.write_json(
        workplace / "runs/stopped/recipe.json", R.description(R.load(workplace / "r.yaml"))
    )
    (workplace / "other.yaml").write_text(json.dumps(recipe))
    from tests.support.command import run as call

    result = call("distill", workplace / "other.yaml", "--out", workplace / "runs/stopped")
    assert result.exit_code == 1
    assert "train.accumulate was 1, now 2" in result.stderr
    assert "--fresh" in result.stderr

"""Two processes over gloo train as one does with the whole batch, for every loss; then the real
command under torchrun.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from edgeclip.host.data import shapes
from edgeclip.host.distill import losses as L
from tests.support import toy_training as toys
from tests.support.files import REPO
from tests.support.torchrun import torchrun

EVERYTHING = {name: {} for name in L.LOSSES if name != "masked_feature"} | {
    "if_align": {"momentum": 0.5},
    "edu_attention": {"axis": "batch", "keep": False},
}
COMKD = {"kl": {}, "if_align": {"weight": 10}, "edu_attention": {}}
SAME: dict[str, dict] = {
    name: {"losses": {name: {}}} for name in L.LOSSES if name != "masked_feature"
} | {
    "every loss and a text tower": {"losses": EVERYTHING, "text": True},
    "in parts": {"losses": EVERYTHING, "text": True, "accumulate": 2},
    "a share more than the other": {
        "losses": EVERYTHING,
        "text": True,
        "batch_size": 13,
        "warmup_batch_size": 7,
    },
    "first training": {"losses": COMKD, "pretrain": {"epochs": 1, "labels": "predictions"}},
    "a ViT, blocks computed twice": {
        "losses": COMKD,
        "kind": "vit",
        "gradient_checkpointing": True,
    },
}
NO_GRADIENT = ("head.fc.bias", "attn.qkv.bias", "tower.norm.bias", "running_mean")
"""What a softmax over the batch, or over keys, or the batch norm after it does not feel: its
gradient is rounding, which AdamW makes steps of; and the running mean that follows such a bias."""
OTHER: dict[str, dict] = {
    "batch norm in the tower": {"losses": COMKD, "kind": "batch norm"},
    "dropout": {"losses": COMKD, "kind": "dropout", "accumulate": 2},
    "masks": {"losses": {"masked_feature": {"patch": 4}}},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found, for every case."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "cases.json").write_text(json.dumps(SAME | OTHER))
    torchrun(Path(toys.__file__), folder / "cases.json", folder)
    return folder, [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("name", list(SAME))
def test_the_loss_curve_is_that_of_one_process_with_the_doubled_batch(both, name):
    folder, (first, second) = both
    steps, weights, log = toys.run(folder, **SAME[name])
    assert len(steps) == len(first[name]["steps"]) >= 8
    np.testing.assert_allclose(first[name]["steps"], steps, rtol=1e-5)
    assert first[name]["steps"] == second[name]["steps"]
    for k in [k for k in weights if not k.endswith(NO_GRADIENT)]:
        v = weights[k]
        np.testing.assert_allclose(
            first[name]["weights"][k], v.double().flatten(), rtol=1e-3, atol=1e-4, err_msg=k
        )
    assert [r.keys() for r in log] == [r.keys() for r in first[name]["log"]]


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_both_processes_hold_the_same_weights(both, name):
    _, (first, second) = both
    learned = [k for k in first[name]["weights"] if "running" not in k]
    assert all(first[name]["weights"][k] == second[name]["weights"][k] for k in learned)


def test_batch_norms_in_the_tower_see_their_share_so_the_curve_is_another(both):
    folder, (first, _) = both
    steps, _, _ = toys.run(folder, **OTHER["batch norm in the tower"])
    found = first["batch norm in the tower"]["steps"]
    np.testing.assert_allclose(found[:4], steps[:4], rtol=1e-5)  # the projector's steps
    assert np.abs(np.array(found[4:]) / steps[4:] - 1).min() > 1e-5


@pytest.mark.slow
def test_the_command_under_torchrun_stopped_and_gone_on(tmp_path):
    shapes.write(tmp_path / ".data" / "shapes")
    recipe = yaml.safe_load((REPO / "recipes" / "smoke.yaml").read_text())
    recipe |= {"other_teachers": [], "views": {"count": 1}}
    recipe["losses"].pop("distribution")
    recipe["train"] |= {"warmup_steps": 8, "lr": 1e-3, "checkpoint_every": 1}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}

    def started(out, *launcher):
        command = [
            sys.executable,
            *launcher,
            "-m",
            "edgeclip",
            "distill",
            "r.yaml",
            "--out",
            f"runs/{out}",
        ]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = started("two", *two)
    while (
        not list((tmp_path / "runs/two/checkpoint").glob("0000000[1-9]?"))
        and process.poll() is None
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert errors.count("is finished and saved in") == 1, errors
    assert (
        list((tmp_path / "runs/two/checkpoint").glob("0000000[1-9]?"))
        and not (tmp_path / "runs/two/student").exists()
    )

    process = started("two", *two)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.count("where the time went") == 1 and errors.count("going on after step") == 1
    one = started("one")
    _, errors = one.communicate(timeout=300)
    assert one.returncode == 0, errors
    results = [
        json.loads((tmp_path / "runs" / out / "results.json").read_text()) for out in ("two", "one")
    ]
    assert [r["processes"] for r in results] == [2, 1]
    for row, other in zip(*(r["log"] for r in results), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert torch.tensor([r["sets"][0]["student"]["top1"] for r in results]).diff().abs() < 0.02

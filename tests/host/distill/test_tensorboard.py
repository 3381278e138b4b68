"""What a run says of itself: TensorBoard's files read back by TensorBoard, and a clock whose names
add up.
"""

import signal
import sys
import time

import pytest

from edgeclip.errors import EdgeclipError, Interrupted
from edgeclip.host.distill import tensorboard as board
from edgeclip.host.distill.step import Step
from edgeclip.progress import Clock
from tests.support.optional import require
from tests.support.toy_training import run

COMKD = {"kl": {}, "if_align": {"weight": 10}, "edu_attention": {}}


def curves(folder):
    require("tensorboard", "pip install 'edgeclip[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_each_curve_is_there_and_a_resumed_run_repeats_no_point(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    case = {
        "losses": COMKD,
        "epochs": 13,
        "checkpoint_every": 7,
        "checkpoints": tmp_path / "checkpoint",
        "board": tmp_path / "board",
    }
    step, number = Step.__call__, iter(range(1000))

    def interrupted(self, *arguments):
        said = step(self, *arguments)
        if next(number) == 21:
            signal.raise_signal(signal.SIGTERM)
        return said

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / "images", **case)
    run(tmp_path / "images", **case)
    steps, _, _ = run(
        tmp_path / "images",
        **{k: v for k, v in case.items() if k not in ("checkpoints", "board")},
    )
    found = curves(tmp_path / "board")
    losses = {"loss/loss", "loss/kl", "loss/if_align"}
    assert found.keys() == losses | {
        "training/alpha",
        "training/learning_rate",
        "speed/images_per_second",
        "speed/waiting",
        "memory/mib",
    }
    assert found["loss/loss"] == [(n, pytest.approx(steps[n - 1])) for n in (10, 20, 30)]
    assert all(0 <= v <= 1 for _, v in found["speed/waiting"]) and all(
        v > 0 for _, v in found["speed/images_per_second"]
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EdgeclipError, match=r"train\.tensorboard: tensorboard is not installed"):
        board.check()


def test_the_clocks_names_add_up_to_the_time_that_passed(tmp_path):
    clock, start = Clock(), time.perf_counter()
    run(tmp_path, COMKD, clock=clock)
    passed = time.perf_counter() - start
    assert {
        "student's frozen features",
        "waiting for images",
        "forward",
        "backward",
        "optimizer",
        "rest of stage 2",
    } == set(clock.laps)
    assert 0 < sum(clock.laps.values()) <= passed

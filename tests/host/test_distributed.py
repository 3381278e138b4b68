"""Two processes over gloo tell each other what `edgeclip.host.distributed` promises; one process needs none of it."""

import json

import pytest
import torch

from edgeclip.host import distributed as ranks
from tests.support.torchrun import torchrun

TALK = """
import json, sys, time
from pathlib import Path
import torch
from edgeclip import ranks

assert ranks.start(torch.device("cpu")) == torch.device("cpu")
folder, rank = Path(sys.argv[1]), ranks.rank()
with ranks.first_alone():
    alone = (folder / "made").exists()
    if not alone:
        time.sleep(0.3)
        (folder / "made").write_text("")
counts = ranks.share(5)
own = torch.arange(5.0)[:, None].split(counts)[rank]
found = {
    "size": ranks.size(),
    "alone": alone,
    "even": ranks.gather(torch.full((2, 2), rank)).tolist(),
    "ragged": ranks.gather(own, counts)[:, 0].tolist(),
    "greatest": ranks.greatest(3 * rank),
}
(folder / f"{rank}.json").write_text(json.dumps(found))
ranks.stop()
"""


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    assert ranks.own(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.own(torch.device("cuda")) == torch.device("cuda", 3) and ranks.own(
        torch.device("cpu")
    ) == torch.device("cpu")


def test_two_processes(tmp_path):
    (tmp_path / "talk.py").write_text(TALK)
    torchrun(tmp_path / "talk.py", tmp_path)
    expected = {
        "size": 2,
        "even": [[0, 0], [0, 0], [1, 1], [1, 1]],
        "ragged": [0, 1, 2, 3, 4],
        "greatest": 3,
    }
    assert [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)] == [
        expected | {"alone": bool(r)} for r in range(2)
    ]


def test_one_process():
    x = torch.arange(6).reshape(3, 2)
    assert ranks.start(torch.device("cpu")) == torch.device("cpu") and (
        ranks.rank(),
        ranks.size(),
    ) == (0, 1)
    assert ranks.gather(x) is x and ranks.greatest(7) == 7
    with ranks.first_alone():
        ranks.wait()


@pytest.mark.parametrize(
    ("count", "of", "expected"), [(5, 2, [3, 2]), (4, 2, [2, 2]), (1, 3, [1, 0, 0])]
)
def test_shares_add_up(count, of, expected):
    assert ranks.share(count, of) == expected

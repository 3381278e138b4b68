"""Two processes over gloo tell each other what `edgeclip.host.distributed` promises; one process
needs none of it.
"""

import json

import pytest
import torch

from edgeclip.host import distributed
from tests.support.torchrun import torchrun

TALK = """
import json, sys, time
from pathlib import Path
import torch
from edgeclip.host import distributed

assert distributed.start(torch.device("cpu")) == torch.device("cpu")
folder, rank = Path(sys.argv[1]), distributed.rank()
with distributed.rank_zero_first():
    alone = (folder / "made").exists()
    if not alone:
        time.sleep(0.3)
        (folder / "made").write_text("")
counts = distributed.split_sizes(5)
own = torch.arange(5.0)[:, None].split(counts)[rank]
found = {
    "size": distributed.world_size(),
    "alone": alone,
    "even": distributed.all_gather(torch.full((2, 2), rank)).tolist(),
    "ragged": distributed.all_gather(own, counts)[:, 0].tolist(),
    "greatest": distributed.all_reduce_max(3 * rank),
}
(folder / f"{rank}.json").write_text(json.dumps(found))
distributed.stop()
"""


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    assert distributed.own(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.own(torch.device("cuda")) == torch.device("cuda", 3) and distributed.own(
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
    assert distributed.start(torch.device("cpu")) == torch.device("cpu") and (
        distributed.rank(),
        distributed.world_size(),
    ) == (0, 1)
    assert distributed.all_gather(x) is x and distributed.all_reduce_max(7) == 7
    with distributed.rank_zero_first():
        distributed.barrier()


@pytest.mark.parametrize(
    ("count", "of", "expected"), [(5, 2, [3, 2]), (4, 2, [2, 2]), (1, 3, [1, 0, 0])]
)
def test_shares_add_up(count, of, expected):
    assert distributed.split_sizes(count, of) == expected

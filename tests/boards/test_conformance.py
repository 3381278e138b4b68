"""The golden images and strings go to a board, the reference stays here, and the board's answers
are scored here.
"""

import json

from edgeclip import disk
from tests.support.command import run
from tests.support.sshd import profile, write_ssh_config


def test_a_board_answers_as_this_machine_does(clip_bundle, clip_pack, sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    command = ("conformance", clip_bundle, "--pack", clip_pack, "--json")
    result = run(*command, "--device", profile(tmp_path), "--keep", tmp_path / "far")
    assert result.exit_code == 0, result.output
    far = json.loads(result.stdout)
    near = json.loads(run(*command, "--keep", tmp_path / "near").stdout)
    assert (far["device"], near["device"]) == ("toy", "host-cpu")
    assert far["machine"]["python"]
    for part in ("images", "texts", "differences", "failures", "bundle", "pack"):
        assert far[part] == near[part]
    of_far, of_near = (disk.read_json(tmp_path / f / disk.MANIFEST) for f in ("far", "near"))
    assert of_far["files"] == of_near["files"]  # by sha256
    there = {p.name for p in (tmp_path / "on-board" / "trees").rglob("*.npy")}
    assert "levels.npy" not in there and "rgb-wide.npy" not in there

    again = run(*command, "--device", tmp_path / "toy.yaml", "--clean")
    assert "sending" not in again.stderr and again.exit_code == 0, again.output
    assert not (tmp_path / "on-board").exists()

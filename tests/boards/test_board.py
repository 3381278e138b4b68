"""The whole way to a board, through a real sshd: reach, copy, install, validate, bench, report,
clean.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.boards import runner
from edgeclip.boards.answers import Built
from edgeclip.boards.board import Board, Load
from edgeclip.boards.measure import open_measurer
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import load_evaluation
from edgeclip.device.machine import Facts
from edgeclip.device.profile import Minimum
from edgeclip.device.profile import load as load_device
from edgeclip.errors import EdgeclipError
from tests.support.boards import validated
from tests.support.command import run
from tests.support.files import REPO
from tests.support.sshd import profile, working_below, write_ssh_config


@pytest.fixture
def a_run(shipped_bundle, evaluation, tmp_path):
    """A run folder with one bundle."""
    shutil.copytree(shipped_bundle("onnx-fp32"), tmp_path / "run" / "bundles" / "onnx-fp32")
    shutil.copytree(evaluation, tmp_path / "run" / "evaluation")
    return tmp_path / "run"


def test_validate_and_bench_through_the_users_own_ssh_setup(a_run, sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    toy = profile(tmp_path)
    result = run("validate", "--run", a_run, "--device", toy, "--json")
    assert result.exit_code == 0, result.output
    (far,) = json.loads(result.stdout)
    (near,) = json.loads(run("validate", "--run", a_run, "--json").stdout)
    assert far["verdict"] == "holds"
    assert far["images"] == 600
    assert far["golden"]["largest_pixel_difference"] == 0
    assert (
        far["cosine"]["centered_min"] == pytest.approx(near["cosine"]["centered_min"], abs=1e-5)
        and far["accuracy"] == near["accuracy"]
    )
    assert disk.read_json(a_run / "reports" / "onnx-fp32.toy.parity.json") == far

    disk.write_json(
        a_run / "recipe.json", {"bench": {"min_duration_s": 2.0, "min_query_count": 20}}
    )
    start = time.time()
    (tmp_path / "meter.csv").write_text(
        "timestamp,watts\n" + "".join(f"{start + t / 500},3\n" for t in range(60_000))
    )
    result = run(
        "bench",
        "--run",
        a_run,
        "--device",
        toy,
        "--json",
        "--clean",
        "--meter",
        tmp_path / "meter.csv",
    )
    assert result.exit_code == 0 and "sending" not in result.stderr, (
        result.output
    )  # all of it was there already
    (report,) = json.loads(result.stdout)
    assert report["single_stream"]["queries"] >= 20
    assert report["cold_start"]["process_ms"] > 0
    assert report["preflight"][0]["check"] == "board"
    power = report["energy"]  # one clock on both sides, and a board that draws as much at rest
    assert abs(power["clock_offset_s"]) <= power["clock_half_width_s"] < 5
    assert power["load_w"] == 3
    assert power["mj_per_image"] == 0
    assert not (tmp_path / "on-board").exists() and working_below(tmp_path / "on-board") == []


def test_several_devices_stand_in_one_table(a_run, sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    disk.write_json(
        a_run / "recipe.json", {"bench": {"min_duration_s": 0.05, "min_query_count": 20}}
    )
    both = ("--device", "host-cpu", "--device", profile(tmp_path))
    assert run("validate", "--run", a_run).exit_code == 0
    result = run("bench", "--run", a_run, *both, "--json")
    record = json.loads(result.stdout)
    assert [r["device"] for r in record["comparison"]] == ["host-cpu", "toy"] and len(
        record["reports"]
    ) == 2, result.output
    assert (
        record["comparison"][0]["accuracy"] == pytest.approx(0.8)
        and record["comparison"][1]["accuracy"] is None
    )  # not validated there
    assert "accuracy" not in record["comparison"][0]["axes"] and any(
        r["on_front"] for r in record["comparison"]
    )
    result = run("bench", "--run", a_run, *both, "--scenario", "single_stream")
    assert "front" in result.stdout, result.output
    assert "onnxruntime_perf_test" in result.stdout, result.output
    assert result.exit_code == 0, result.output


def test_a_jump_host_of_the_users_config_is_taken(sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    result = run("doctor", "--device", profile(tmp_path, "far"), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["machine"]["python"], result.output


def test_the_shipped_loopback_needs_no_setup(shipped_bundle, tmp_path, home):
    name, device = load_device("loopback")
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    with Board(name, device, options=None) as board:
        board.prepare([bundle], None)
        assert validated(board, bundle).verdict == "cannot tell"
        assert board.bench(bundle, Load(Minimum(0.0, 5), ("offline",))).offline.queries >= 1


def test_a_command_prefix_is_a_way_too(shipped_bundle, tmp_path):
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\npackages: [onnxruntime]\ncpus: [{min(os.sched_getaffinity(0))}]\n"
    )
    name, device = load_device(str(tmp_path / "d.yaml"))
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    with Board(name, device) as board:
        board.prepare([bundle], None)
        assert validated(board, bundle).failures == []
    result = run(
        "selftest",
        "--bundle",
        bundle.folder,
        "--device",
        tmp_path / "d.yaml",
        "--out",
        tmp_path,
        "--clean",
        "--json",
    )
    assert (
        json.loads(result.stdout)[0]["machine"]["cores"] == 1 and not (tmp_path / "b").exists()
    ), result.output


def test_what_lies_on_the_board_travels_once(shipped_bundle, evaluation, tmp_path):
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\n"
    )
    files = {disk.sha256(p): p for p in shipped_bundle("onnx-fp32").rglob("*") if p.is_file()}
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        assert board.send(files, "bundle") == sum(p.stat().st_size for p in files.values())
        assert board.send(files, "bundle") == 0
        tree = board._tree(evaluation)
        loaded = load_evaluation(Path(tree))  # a whole folder, by its own manifest
        assert (loaded.reference == np.load(evaluation / "image_features.npy")).all()


def test_an_engine_that_is_kept_needs_no_memory_for_its_build(shipped_bundle, tmp_path):
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [tensorrt]\n"
    )
    bundle = Bundle.load(shipped_bundle("tensorrt-int8"))
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        for need in ("3000 MiB", "300 MiB"):
            assert next(
                r.need for r in board.preflight([bundle], None) if r.check == "memory"
            ).startswith(need)
            (
                tmp_path
                / "b"
                / "engines"
                / disk.sha256(bundle.folder / bundle.manifest.image_encoder)[:16]
            ).mkdir(parents=True, exist_ok=True)


def test_a_changed_byte_on_the_way_is_refused(tmp_path):
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\n"
    )
    (tmp_path / "file").write_bytes(b"abc")
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        with pytest.raises(EdgeclipError, match="not what was sent"):
            board.send({"0" * 64: tmp_path / "file"}, "file")
        for name in ("../out", "/etc/x"):
            with pytest.raises(EdgeclipError, match="lies outside"):
                board.ask("build", Built, name="trees/t", files={name: "0" * 64})
    assert not (tmp_path / "out").exists()


def test_only_what_edgeclip_left_is_removed(tmp_path):
    mine = tmp_path / "precious" / "store" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("ten years")
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/precious}}\nruntimes: [onnxruntime]\n"
    )
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        with pytest.raises(
            EdgeclipError,
            match=r"holds files that are not edgeclip's; name an empty or a new folder",
        ):
            board.send({disk.sha256(mine): mine}, "file")
        assert not board.clean()
        assert mine.read_text() == "ten years"
        assert list((tmp_path / "precious").iterdir()) == [mine.parent]


def test_what_somebody_put_beside_it_later_stays(tmp_path):
    (tmp_path / "b").mkdir()  # an empty folder will do
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\n"
    )
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        board.send({disk.sha256(tmp_path / "file"): tmp_path / "file"}, "file")
        (tmp_path / "b" / "notes.txt").write_text("mine")
        assert board.clean() and [f.name for f in (tmp_path / "b").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("linked", [True, False])
def test_it_is_cleaned_when_something_went_wrong_too(tmp_path, linked):
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\n"
    )
    (tmp_path / "file").write_bytes(b"abc")

    async def broken():
        raise ConnectionResetError

    with (
        pytest.raises(EdgeclipError, match="no: good"),
        open_measurer(*load_device(str(tmp_path / "d.yaml")), clean=True) as board,
    ):
        board.send({disk.sha256(tmp_path / "file"): tmp_path / "file"}, "file")
        board.link = board.link if linked else board.link._replace(start=broken)
        raise EdgeclipError(
            "no", "good", "at all"
        )  # is what the user sees, whether the board is still there or not
    assert (tmp_path / "b").exists() == (not linked)


def test_two_at_once_would_measure_each_other(shipped_bundle, tmp_path):
    import fcntl

    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [env], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\npackages: [onnxruntime]\n"
    )
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        board.prepare([bundle], None)
        with open(tmp_path / "b" / ".run", "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            with pytest.raises(EdgeclipError, match="another edgeclip is at work there"):
                validated(board, bundle)
            with pytest.raises(EdgeclipError, match="another edgeclip is at work there"):
                board.clean()  # nor does it take away what another is measuring
        assert validated(board, bundle).failures == []
        assert board.clean() and not (tmp_path / "b").exists()


def test_words_of_a_login_shell_are_not_taken_for_the_answer(tmp_path):
    shell = tmp_path / "chatty"
    shell.write_text('#!/bin/sh\necho "Welcome to the board"; printf "$ "; exec "$@"\n')
    shell.chmod(0o755)
    (tmp_path / "d.yaml").write_text(
        f"reach: {{command: [{shell}], folder: {tmp_path}/b}}\nruntimes: [onnxruntime]\n"
    )
    with Board(*load_device(str(tmp_path / "d.yaml"))) as board:
        assert board.facts.python


def test_the_runner_is_the_device_layer_and_nothing_of_the_host(tmp_path):
    import io
    import zipfile

    content = runner.device_layer()
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert content == runner.device_layer()
    assert "edgeclip/device/__main__.py" in names
    assert "edgeclip/device/runtime/onnxruntime.py" in names
    (tmp_path / "own.zip").write_bytes(content)
    assert (
        len(content)
        < 0.5 * runner.unpacked({"own": tmp_path / "own.zip"})
        == 0.5 * sum((REPO / n).stat().st_size for n in names)
    )


def test_the_remote_command_is_one_constant_string():
    from edgeclip.boards import link

    assert link.COMMAND == (
        "exec python3 -u -c 'import sys; b = sys.stdin.buffer; "
        'exec(compile(b.read(int(b.readline())), "agent.py", "exec"))\''
    )
    source = (REPO / "edgeclip" / "boards" / "link.py").read_text()
    assert source.count("COMMAND]") == 1  # either way as it is
    assert source.count("create_process(COMMAND,") == 1


def test_what_marks_an_answer_is_one_word_on_both_sides():
    from edgeclip.boards import link

    source = (REPO / "edgeclip" / "boards" / "agent.py").read_text()
    assert f'MARK = b"{link.MARK.decode()}"' in source


@pytest.mark.parametrize(
    ("python", "glibc", "says"),
    [("3.8.10", "2.31", "3.10 is the oldest"), ("3.11.2", None, "not glibc")],
)
def test_a_board_that_cannot_run_it_is_told_so(python, glibc, says):
    with pytest.raises(EdgeclipError, match=says):
        runner.wheels("old", Facts(arch="aarch64", python=python, os="an os", glibc=glibc), ())


def test_the_agent_uses_the_standard_library_only_and_an_old_grammar():
    import ast

    tree = ast.parse(
        (REPO / "edgeclip" / "boards" / "agent.py").read_text(), feature_version=(3, 8)
    )
    imported = {
        n.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for n in node.names
    }
    assert imported <= set(sys.stdlib_module_names)
    ast.parse((REPO / "edgeclip" / "device" / "machine.py").read_text(), feature_version=(3, 8))

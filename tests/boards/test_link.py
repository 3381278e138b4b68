"""What can go wrong on the way to a board: each is one line that says what to do, and nothing
half-done is believed.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.boards import runner
from edgeclip.boards.answers import Built
from edgeclip.boards.board import Board, Load
from edgeclip.device.bench_report import (
    BenchReport,
    EnergyMarks,
)
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import load as load_device
from edgeclip.device.records import (
    from_json,
    to_json,
)
from edgeclip.errors import EdgeclipError, LinkLost
from tests.support.boards import validated
from tests.support.command import mistake, run
from tests.support.reports import bench_report
from tests.support.sshd import mount_tmpfs, profile, working_below, write_ssh_config


@pytest.fixture
def a_run(shipped_bundle, evaluation, tmp_path):
    shutil.copytree(shipped_bundle("onnx-fp32"), tmp_path / "run" / "bundles" / "onnx-fp32")
    shutil.copytree(evaluation, tmp_path / "run" / "evaluation")
    return tmp_path / "run"


def test_a_refused_connection(sshd, home, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        write_ssh_config(home, sshd(), port=s.getsockname()[1])
    error = mistake(
        "doctor", "--device", profile(tmp_path), says="cannot be reached over ssh as 'board'"
    )
    assert "refused" in error and "ssh -o BatchMode=yes board true" in error


def test_a_host_that_nobody_knows(home, tmp_path):
    mistake(
        "doctor",
        "--device",
        profile(tmp_path, "no-such-board.invalid"),
        says="cannot be reached over ssh",
    )


def test_a_wrong_host_key_is_not_trusted(sshd, home, tmp_path):
    options = sshd()
    other = Path(sshd()["known_hosts"]).read_text().split(" ", 1)[1]
    write_ssh_config(home, options, host_key=other)
    error = mistake(
        "doctor", "--device", profile(tmp_path), says="its host key is not the known one"
    )
    assert "ssh board" in error and not (tmp_path / "on-board").exists()


def test_an_unknown_host_key_is_not_accepted(sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    (home / ".ssh" / "known_hosts").unlink()
    mistake("doctor", "--device", profile(tmp_path), says="its host key is not the known one")
    assert not (home / ".ssh" / "known_hosts").exists()


def test_a_password_prompt_does_not_hang(sshd, home, tmp_path):
    write_ssh_config(home, sshd("PasswordAuthentication yes\nAuthenticationMethods password\n"))
    # Nobody types one here: a command that asked would never come back.
    error = mistake("doctor", "--device", profile(tmp_path), says="no key of yours was accepted")
    assert "ssh-copy-id board" in error


def test_a_key_with_a_passphrase_does_not_ask_for_it(sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-f", str(home / ".ssh" / "key"), "-N", "secret"], check=True
    )
    mistake("doctor", "--device", profile(tmp_path), says="key")


def test_a_copy_that_breaks_off_goes_on_where_it_was(sshd, proxy, home, tmp_path):
    options = sshd()
    cut = proxy(options["port"], limit=6_000_000)
    whole = proxy(options["port"])
    (tmp_path / "big").write_bytes(np.random.default_rng(0).bytes(12_000_000))
    files = {disk.sha256(tmp_path / "big"): tmp_path / "big"}
    name, device = load_device(str(profile(tmp_path)))

    def through(p):
        known = tmp_path / f"known-{p.port}"
        known.write_text(
            f"[127.0.0.1]:{p.port} " + Path(options["known_hosts"]).read_text().split(" ", 1)[1]
        )
        return Board(name, device, options={**options, "port": p.port, "known_hosts": str(known)})

    with through(cut) as board, pytest.raises(LinkLost, match="broke off during 'put'"):
        board.send(files, "big")
    with through(whole) as board:
        rest = board.send(files, "big")
        assert (
            5_000_000 < rest < 12_000_000 and whole.passed < rest + 500_000
        )  # what had arrived did not travel again
        assert board.send(files, "big") == 0
    (stored,) = (tmp_path / "on-board" / "store").iterdir()
    assert stored.read_bytes() == (tmp_path / "big").read_bytes()


def test_a_benchmark_whose_link_breaks_is_marked_incomplete_and_ends_there(
    a_run, sshd, proxy, home, tmp_path
):
    options = sshd()
    between = proxy(options["port"])
    write_ssh_config(home, options, port=between.port)
    toy = profile(tmp_path, bench="{min_duration_s: 120, min_query_count: 20}")
    on_board = tmp_path / "on-board"

    def cut():
        for _ in range(600):
            if (on_board / "runner").exists() and len(working_below(on_board)) > 0:
                time.sleep(2)
                between.cut()
                return
            time.sleep(0.1)

    threading.Thread(target=cut, daemon=True).start()
    mistake(
        "bench",
        "--run",
        a_run,
        "--device",
        toy,
        says="the link broke off during 'run'",
        only_line=False,
    )
    report = disk.read_json(a_run / "reports" / "onnx-fp32.toy.bench.json")
    assert "broke off" in report["incomplete"]
    assert report["single_stream"] is None
    assert report["failures"]
    from edgeclip.reports.targets import verdict

    said = verdict(None, from_json(report, BenchReport, "the report"))
    assert "do not ship" in said
    assert "incomplete" in said
    for _ in range(100):
        if not working_below(on_board):
            break
        time.sleep(0.1)
    assert working_below(on_board) == []  # nobody goes on measuring for a host that has gone


def test_a_meters_file_that_is_gone_after_the_load_costs_the_energy_alone(shipped_bundle, tmp_path):
    board = Board(*load_device("loopback"))
    marks = EnergyMarks((0.0, 1.0, 2.0), [(1.0, 0), (2.0, 9)], [])
    folder = shipped_bundle("onnx-fp32")
    measured = bench_report(
        marks=marks, target="onnx-fp32", bundle=disk.sha256(folder / disk.MANIFEST)
    )
    board.clock, board._run = lambda: (0.0, 0.1), lambda *_, **__: (to_json(measured), b"")
    report = board.bench(
        Bundle.load(folder),
        Load(board.device.bench, ("single_stream",), meter_csv=tmp_path / "gone.csv"),
    )
    assert report.single_stream == measured.single_stream
    assert report.energy is None
    assert report.marks is None
    assert [f.split(":")[0] for f in report.failures] == ["energy not measured"]

    readings = "".join(f"{t / 500},3\n" for t in range(1000))
    (tmp_path / "meter.csv").write_text("timestamp,watts\n" + readings)
    report = board.bench(
        Bundle.load(folder),
        Load(board.device.bench, ("single_stream",), meter_csv=tmp_path / "meter.csv"),
    )
    assert report.failures == []
    assert report.energy.load_w == 3
    board.loop.close()


def test_a_board_without_room_is_told_before_anything_travels(sshd, home, tmp_path):
    mount_tmpfs(tmp_path / "on-board", "4m")
    try:
        (tmp_path / "big").write_bytes(b"x" * 8_000_000)
        name, device = load_device(str(profile(tmp_path)))
        write_ssh_config(home, sshd())
        with Board(name, device) as board:
            with pytest.raises(EdgeclipError, match="MiB are free; make room"):
                board.send({disk.sha256(tmp_path / "big"): tmp_path / "big"}, "big")
            # and a disk that fills up on the way: the half file is taken away again
            with pytest.raises(EdgeclipError, match="No space left"):
                blocks = [b"x" * 1_000_000] * 8
                board._wait(
                    board.link.ask(
                        "put", blocks, folder=board.folder, files=[["f" * 64, 8_000_000, 0]]
                    )
                )
            assert list((tmp_path / "on-board" / "store").iterdir()) == []
            # 8 MB of which 8 KB travel: what is unpacked counts, and what cannot be unpacked is
            # taken away again
            with zipfile.ZipFile(tmp_path / "wheel", "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr("module.py", b"x" * 8_000_000)
            wheel = {disk.sha256(tmp_path / "wheel"): tmp_path / "wheel"}
            with pytest.raises(EdgeclipError, match="MiB are free; make room"):
                board.send(wheel, "runner", runner.unpacked(wheel))
            board.send(wheel, "runner")
            with pytest.raises(EdgeclipError, match="No space left"):
                board.ask("build", Built, name="runner/r", unpack=list(wheel))
            assert (
                list((tmp_path / "on-board" / "runner").iterdir()) == []
                and board.send(wheel, "runner") == 0
            )  # it need not travel again
    finally:
        subprocess.run(["umount", str(tmp_path / "on-board")], check=True)


def lie(tmp_path, code):
    """sshd's lines that let every Python on the board begin with `code`."""
    (tmp_path / "lie").mkdir(exist_ok=True)
    (tmp_path / "lie" / "sitecustomize.py").write_text(code)
    return f"SetEnv PYTHONPATH={tmp_path / 'lie'}\n"


def test_a_wrong_clock_is_a_warning_and_reports_carry_the_hosts_time(sshd, home, tmp_path):
    write_ssh_config(
        home,
        sshd(
            lie(
                tmp_path,
                "import time\nreal = time.time\ntime.time = lambda: real() - 86400 * 365\n",
            )
        ),
    )
    result = run("doctor", "--device", profile(tmp_path), "--json")
    row = next(r for r in json.loads(result.stdout)["preflight"] if r["check"] == "clock")
    assert row["status"] == "warn"
    assert row["found"].startswith("-31536")
    assert result.exit_code == 0


def test_a_board_that_rebooted_between_the_build_and_the_run(shipped_bundle, sshd, home, tmp_path):
    boot = tmp_path / "boot"
    boot.write_text("first")
    code = (
        "import pathlib\nreal = pathlib.Path.read_text\n"
        f"pathlib.Path.read_text = lambda p, *a, **k: open({str(boot)!r}).read() if p.name == 'boot_id' else real(p, *a, **k)\n"
    )
    write_ssh_config(home, sshd(lie(tmp_path, code)))
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    name, device = load_device(str(profile(tmp_path)))
    with Board(name, device) as board:
        board.prepare([bundle], None)
        boot.write_text("second")
        with pytest.raises(LinkLost, match="was restarted before"):
            validated(board, bundle)
        board.prepare([bundle], None)  # what lies there is whole: nothing travels again
        assert validated(board, bundle).failures == []


def test_a_board_that_is_another_one_is_not_measured(a_run, sshd, home, tmp_path):
    write_ssh_config(home, sshd())
    toy = profile(tmp_path, more="recognize: {device_tree_model: Raspberry Pi 5}\n")
    error = mistake(
        "bench", "--run", a_run, "--device", toy, says="not 'Raspberry Pi 5'", only_line=False
    )
    assert "not fit to be measured" in error and not (tmp_path / "on-board" / "runner").exists()
    assert run("doctor", "--device", toy).exit_code == 3


def test_without_asyncssh_the_install_line(tmp_path):
    code = f"import sys\nsys.modules['asyncssh'] = None\nfrom edgeclip.cli import main\nmain(['doctor', '--device', {str(profile(tmp_path))!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'edgeclip[ssh]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_board_without_python_is_told_so(sshd, home, tmp_path):
    write_ssh_config(home, sshd(f"SetEnv PATH={tmp_path}\n"))
    mistake("doctor", "--device", profile(tmp_path), says="python3", only_line=False)

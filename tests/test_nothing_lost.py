"""A process may be killed at any moment, beside others: old or new is whole, and nothing stays."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeclip import disk
from edgeclip.disk import exchange, leftovers
from edgeclip.errors import EdgeclipError
from tests.support.files import snapshot

KILLED = """
import os, signal, sys
from pathlib import Path
from edgeclip import disk
from edgeclip.disk import exchange
wanted, seen = int(sys.argv[1]), 0
def step():
    global seen
    if seen == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
    seen += 1
def heard(event, arguments):
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        step()
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_CREAT):
        step()
swap = exchange._exchange
if sys.argv[2] == "without exchange":
    swap = lambda a, b: False
exchange._exchange = lambda a, b: (step(), swap(a, b))[1]
sync = os.fsync
os.fsync = lambda fd: (step(), sync(fd))[1]
sys.addaudithook(heard)
"""
FOLDER = """
with disk.new_folder(Path("box")) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("new")
    disk.write_manifest(folder, "parcel", {"age": "new"})
"""
FILE = "disk.write_text(Path('f.txt'), 'new')"


def killed(code, folder, at, how="exchange"):
    """Run `code` killed before its step number `at`; whether it got so far."""
    command = [sys.executable, "-c", KILLED + code, str(at), how]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def every_kill(code, folder, how="exchange"):
    """Kill `code` at its first step, its second and so on, until it ends before it is killed."""
    at = 0
    while killed(code, folder, at, how):
        yield at
        at += 1
    assert at > 5


def box(folder, age):
    with disk.new_folder(folder / "box") as new:
        (new / "a").write_text(age)
        disk.write_manifest(new, "parcel", {"age": age})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exchange", "without exchange"])
def test_a_folder_killed_at_every_step_is_the_old_or_the_new_one(tmp_path, how):
    box(tmp_path, "old")
    ages = []
    for _ in every_kill(FOLDER, tmp_path, how):
        manifest = disk.read_manifest(tmp_path / "box", "parcel")
        disk.verify(tmp_path / "box", manifest)
        ages.append(manifest["age"])
        assert disk.finished_in(tmp_path) == [tmp_path / "box"]  # what is hidden is none
        box(tmp_path, "old")
        assert {name.split("/")[0] for name in snapshot(tmp_path)} == {"box"}
    assert set(ages) == {"old", "new"} and ages == sorted(ages, reverse=True)


@pytest.mark.slow
def test_a_file_killed_at_every_step_is_the_old_or_the_new_one(tmp_path):
    disk.write_text(tmp_path / "f.txt", "old")
    for _ in every_kill(FILE, tmp_path):
        assert (tmp_path / "f.txt").read_text() in ("old", "new")
        disk.write_text(tmp_path / "f.txt", "old")
        assert snapshot(tmp_path) == {"f.txt": b"old"}


def test_temporary_names_do_not_depend_on_the_process(tmp_path):
    """Two containers have equal process numbers; a name that is there is not taken."""
    names = {leftovers.temporary_folder(tmp_path / "x").name for _ in range(100)}
    names |= {leftovers.temporary_file(tmp_path / "x.npy").name for _ in range(100)}
    assert len(names) == 200 and not any(str(os.getpid()) in name for name in names)


def test_who_sweeps_never_takes_what_another_just_made(tmp_path):
    """Four processes write one name without a pause, each sweeping before: all of them end."""
    code = """
from pathlib import Path
from edgeclip import disk
for i in range(100):
    disk.write_text(Path("f.txt"), "whole")
    with disk.new_folder(Path(f"box{i % 3}")) as folder:
        disk.write_manifest(folder, "parcel", {})
"""
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(4)]
    said = [writer.communicate()[1].decode() for writer in writers]
    assert said == [""] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"f.txt", "box0", "box1", "box2"}


def test_what_somebody_holds_is_not_swept(tmp_path):
    """The same name written by two at once: both end whole, and the last one counts."""
    entered, left = threading.Event(), threading.Event()

    def slow():
        with disk.new_file(tmp_path / "f.txt") as temporary:
            temporary.write_text("slow")
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=slow)
    thread.start()
    entered.wait(10)
    disk.write_text(tmp_path / "f.txt", "fast")
    assert (tmp_path / "f.txt").read_text() == "fast"
    left.set()
    thread.join()
    assert snapshot(tmp_path) == {"f.txt": b"slow"}


@pytest.mark.parametrize(
    "name", [".box.tmp", ".box.12345678901234567890.tmp", ".boxes.0123456789abcdef.tmp", "box.tmp"]
)
def test_what_only_looks_like_ours_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("mine")
    (tmp_path / ".box.0123456789abcdef.tmp").symlink_to(elsewhere)
    box(tmp_path, "new")
    assert (tmp_path / name / "thesis").read_text() == "mine"
    assert (elsewhere / "thesis").read_text() == "mine"


def test_a_disk_without_an_exchange_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_exchange", lambda a, b: False)
    for age in ("old", "new"):
        box(tmp_path, age)
    assert disk.read_manifest(tmp_path / "box", "parcel")["age"] == "new"
    assert {name.split("/")[0] for name in snapshot(tmp_path)} == {"box"}


# --- two at once

HOLDER = """
import sys, time
from pathlib import Path
from edgeclip import disk
sys.argv = ["edgeclip", "export"]
with disk.locked(Path("box")):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_the_second_is_told_who_has_it_and_a_killed_holder_lets_go(tmp_path):
    process = holder(tmp_path)
    with (
        pytest.raises(
            EdgeclipError, match=f"in use by edgeclip export, process {process.pid} on .*, since"
        ),
        disk.locked(tmp_path / "box"),
    ):
        pass
    process.kill()
    process.wait()
    with disk.locked(tmp_path / "box"):
        pass
    assert snapshot(tmp_path) == {}


def test_who_takes_the_lock_removes_what_a_killed_holder_left_beside_the_folder(tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    (box / disk.MANIFEST).write_text("{}")
    for left in (".box.0123456789abcdef.tmp", ".box.0123456789abcdef.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / disk.MANIFEST).write_text("{}")
    other = tmp_path / ".boxes.0123456789abcdef.tmp"  # of another folder
    other.mkdir()
    with disk.locked(box):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".box.lock", other.name, "box"]


def test_the_second_waits_where_the_command_takes_seconds(tmp_path):
    process = holder(tmp_path)
    threading.Timer(0.5, process.kill).start()
    with disk.locked(tmp_path / "box", wait=True):
        assert process.wait() == -signal.SIGKILL


def test_a_link_and_the_folder_itself_have_one_lock(tmp_path):
    (tmp_path / "box").mkdir()
    Path(tmp_path / "link").symlink_to("box")
    with (
        disk.locked(tmp_path / "link"),
        pytest.raises(EdgeclipError, match="in use by"),
        disk.locked(tmp_path / "box"),
    ):
        pass


READER = """
import sys, time
from pathlib import Path
from edgeclip import disk
sys.argv = ["edgeclip", "evaluate"]
with disk.shared(Path("box")):
    print("held", flush=True)
    sys.stdin.readline()
"""


def reader(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", READER],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_readers_share_and_a_writer_is_told_of_one_that_still_reads(tmp_path):
    first, second = reader(tmp_path), reader(tmp_path)
    for gone, left in ((first, second), (second, None)):
        gone.kill()
        gone.wait()
        gone.stdin.close()
        with contextlib.ExitStack() as stack:
            if left is not None:
                says = f"in use by edgeclip evaluate, process {left.pid} on "
                stack.enter_context(pytest.raises(EdgeclipError, match=says))
            stack.enter_context(disk.locked(tmp_path / "box"))
    assert snapshot(tmp_path) == {}


def test_a_reader_is_told_of_the_writer_and_the_last_reader_removes_the_lock(tmp_path):
    with (
        disk.locked(tmp_path / "box"),
        pytest.raises(EdgeclipError, match=f"box: is in use by .*, process {os.getpid()} on "),
        disk.shared(tmp_path / "box"),
    ):
        pass
    with disk.shared(tmp_path / "box"):
        with disk.shared(tmp_path / "box"):
            pass
        with pytest.raises(EdgeclipError, match="in use by"), disk.locked(tmp_path / "box"):
            pass
        assert [*snapshot(tmp_path)] == [".box.lock"]
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("how", ["exchange", "without exchange"])
def test_a_folder_that_is_read_is_replaced_afterwards(tmp_path, monkeypatch, how):
    if how == "without exchange":
        monkeypatch.setattr(exchange, "_exchange", lambda a, b: False)
    box(tmp_path, "old")
    thread = threading.Thread(target=box, args=(tmp_path, "new"))
    with disk.reading(tmp_path / "box"), disk.reading(tmp_path / "box"):
        manifest = disk.read_manifest(tmp_path / "box", "parcel")
        thread.start()
        time.sleep(0.5)
        assert manifest["age"] == "old"
        disk.verify(tmp_path / "box", manifest)
    thread.join()
    assert disk.read_manifest(tmp_path / "box", "parcel")["age"] == "new"
    assert {name.split("/")[0] for name in snapshot(tmp_path)} == {"box"}


def test_what_is_not_there_is_read_by_nobody(tmp_path):
    with disk.reading(tmp_path / "nothing"):
        box(tmp_path, "new")
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "box" / "a").read_text() == "new"


def test_two_that_make_the_same_folder_both_end_and_it_is_one_of_theirs(tmp_path):
    """Neither found one when it began."""
    with disk.new_folder(tmp_path / "box") as slow:
        (slow / "a").write_text("slow")
        disk.write_manifest(slow, "parcel", {"age": "slow"})
        box(tmp_path, "fast")
    assert disk.read_manifest(tmp_path / "box", "parcel")["age"] == "slow"
    assert {name.split("/")[0] for name in snapshot(tmp_path)} == {"box"}

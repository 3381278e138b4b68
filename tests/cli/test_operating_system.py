"""What the operating system refuses is one line, before the work where it can be known before."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.errors import EdgeclipError
from tests.support.command import mistake, run
from tests.support.files import same, snapshot, write
from tests.support.images import photos
from tests.support.tiny_recipe import RECIPE

NOBODY = 65534
UNKNOWN = 4242
NOT_UTF8 = os.fsdecode(b"\xe9t\xe9")
COMMAND = (sys.executable, "-m", "edgeclip")


def outside(*arguments, **more):
    """The command line as a process of its own."""
    command = [*COMMAND, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, **more)


def one_line(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "; " in lines[0] and ": " in lines[0].removeprefix("Error: ")
    return lines[0]


def as_a_user(code, cwd, user=NOBODY, **more):
    """Python after `code`'s imports, as a user whom rights hold, as they do not hold root."""
    first, then = code
    drop = (
        f"import os\nif os.getuid() == 0: os.setgroups([]); os.setgid({user}); os.setuid({user})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", first + drop + then],
        capture_output=True,
        text=True,
        cwd=cwd,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def writers(bundle, folder):
    """Every command that writes, and where."""
    place = folder / "new"
    yield "labels", bundle, "an apple, a pear", "--out", place
    yield "embed", "cat.png", "--bundle", bundle, "--out", place / "f.npy"
    yield "init", "photos", "--out", place / "r.yaml"
    yield "distill", "r.yaml", "--out", place
    yield "cache", "build", "r.yaml", "--out", place
    yield "selftest", "--bundle", bundle, "--device", "host-cpu", "--out", place
    yield "conformance", bundle, "--keep", place
    yield "conformance", bundle, "--pack", place
    yield (
        *("export", "--model", "mobileone_s0", "--weights", "random"),
        *("--target", "onnx-fp32", "--out", place),
    )


def prepared(here, cat):
    photos(here / "photos")
    write(here, RECIPE.replace("ROOT", "photos"))
    if cat != here / "cat.png":
        shutil.copy(cat, here / "cat.png")


def test_where_a_file_lies_no_folder_is_made(here, cat, shipped_bundle):
    bundle = shipped_bundle("onnx-fp32")
    prepared(here, cat)
    (here / "file").write_text("mine")
    before = snapshot(here)
    for command in writers(bundle, here / "file"):
        says = "file: a file lies where a folder is needed"
        mistake(*command, says=says, only_line=False)
    same(here, before)


def test_a_folder_that_may_not_be_written_to():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o555)
        first = (
            "from pathlib import Path\nfrom edgeclip import disk\n"
            "from edgeclip.errors import EdgeclipError\n"
        )
        then = (
            "for ask in (disk.refuse_unwritable, lambda p: disk.refuse_foreign(p, None)):\n"
            "    try: ask(Path('locked/a/b'))\n"
            "    except EdgeclipError as e: print(e)\n"
        )
        lines = as_a_user((first, then), folder)
    assert len(lines) == 2
    for line in lines:
        what = "may not be written to by this user"
        do = "choose another path, or change its owner or rights"
        assert line.endswith(f"locked: {what}; {do}")


def test_a_mount_point_cannot_be_replaced_and_a_folder_in_it_can_be_made(shipped_bundle):
    mounted = Path("/dev/shm")
    assert os.path.ismount(mounted)
    mistake(
        *("labels", shipped_bundle("onnx-fp32"), "an apple, a pear", "--out", mounted),
        says="/dev/shm: is a mount point",
    )
    new = mounted / f"edgeclip-{os.getpid()}"
    try:
        with disk.new_folder(new) as folder:
            disk.write_manifest(folder, "parcel", {})
        assert disk.read_manifest(new, "parcel")["files"] == {}
    finally:
        shutil.rmtree(new, ignore_errors=True)


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(here, own_bundle):
    bundle = own_bundle("onnx-fp32")
    (here / "current").symlink_to(bundle)
    assert run("labels", "current", "an apple, a pear", "--in-place").exit_code == 0
    assert (here / "current").is_symlink()
    assert Bundle.load(bundle).labels == ["an apple", "a pear"]


def test_a_bundle_may_be_the_working_folder(own_bundle, cat, monkeypatch):
    monkeypatch.chdir(own_bundle("onnx-fp32"))
    assert run("classify", cat, "--bundle", ".").exit_code == 0
    result = run("labels", ".", "an apple, a pear", "--out", "../other")
    assert result.exit_code == 0, result.output
    assert run("labels", ".", "an apple, a pear", "--out", ".").exit_code == 1


def test_a_loop_of_links(here):
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    with pytest.raises((EdgeclipError, OSError)):
        disk.refuse_unwritable(here / "a" / "c")
    mistake("init", "a", says="a: ")
    mistake("classify", "x.png", "--bundle", "a", says="a")


def test_names_that_are_not_utf8(here, cat, shipped_bundle):
    """Places are refused by a name that can be read; an image is opened, its name escaped."""
    bundle = shipped_bundle("onnx-fp32")
    prepared(here, cat)
    before = snapshot(here)
    for command in writers(bundle, here / NOT_UTF8):
        mistake(*command, says="\\xe9t\\xe9", only_line=False)
    mistake("report", NOT_UTF8, says="its name is not UTF-8")
    mistake("classify", cat, "--bundle", NOT_UTF8, says="its name is not UTF-8")
    same(here, before)

    shutil.copy(cat, here / f"{NOT_UTF8}.png")
    result = run("classify", f"{NOT_UTF8}.png", "--bundle", bundle)
    assert result.exit_code == 0 and result.stdout.startswith("\\xe9t\\xe9.png\n")
    (here / "photos" / "cat" / f"{NOT_UTF8}.png").write_bytes(b"")
    for command in (("init", "photos", "--out", "x.yaml"), ("distill", "r.yaml")):
        mistake(*command, says="\\xe9t\\xe9.png: its name is not UTF-8", only_line=False)


@pytest.mark.parametrize(("name", "says"), [("", "is empty"), (NOT_UTF8, "is not UTF-8")])
def test_a_path_that_is_none_at_every_door(here, shipped_bundle, name, says):
    """The empty one of an unset variable is not the working folder."""
    bundle = shipped_bundle("onnx-fp32")
    write(here, RECIPE.replace("ROOT", "photos"))
    write(here, RECIPE.replace("ROOT", json.dumps("")), "empty.yaml")
    before = snapshot(here)
    for command in (
        ("labels", bundle, "a cat, a dog", "--out", name),
        ("labels", bundle, f"@{name}"),
        ("report", name),
        ("distill", "r.yaml", "--data", name),
        ("distill", "r.yaml", "--data", f"shop={name}"),
        ("cache", "build", "r.yaml", "--data", f"shop={name}"),
    ):
        mistake(*command, says=says)
    mistake("distill", "empty.yaml", says="data.root: is empty")
    same(here, before)


def test_without_a_home_and_an_unknown_user(here, cat, shipped_bundle):
    """Nothing that needs no cache of the user's asks for a home; what needs one says so."""
    without = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    first = (
        "from edgeclip import disk\nfrom edgeclip.errors import EdgeclipError\n"
        "from edgeclip.device.selftest import without_paths\nfrom pathlib import Path\n"
    )
    then = (
        "os.environ.pop('HOME', None)\nwithout_paths('a', Path('b'))\n"
        "try: print(disk.cache_folder())\nexcept EdgeclipError as e: print(e)\n"
    )
    lines = as_a_user((first, then), "/", UNKNOWN, env=without)
    if os.getuid() == 0:
        do = "set HOME, or XDG_CACHE_HOME, to a folder"
        assert lines == [f"HOME: is not set, and this user has no home folder; {do}"]
    classified = outside("classify", cat, "--bundle", shipped_bundle("onnx-fp32"), env=without)
    assert classified.returncode == 0, classified.stderr


def small_files(limit):
    """Let this process write no file beyond `limit` bytes: the kernel refuses, as a full disk."""

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return set_limit


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_disk_that_fills_in_the_middle(here, own_bundle, limit):
    """Nothing half-written is left, and what was there before is."""
    bundle = own_bundle("onnx-fp32")
    before = snapshot(here), snapshot(bundle)
    for where in (("--out", "new"), ("--in-place",)):
        done = outside(
            *("labels", bundle, "an apple, a pear", *where), preexec_fn=small_files(limit)
        )
        assert "File too large" in one_line(done)
        assert (snapshot(here), snapshot(bundle)) == before


def test_too_many_open_files(here, cat, shipped_bundle):
    """That the machine lacks something is not taken for damage of the image, and is said."""
    shutil.copy(cat, here / "dog.png")
    arguments = ["classify", "cat.png", "dog.png", "--bundle", str(shipped_bundle("onnx-fp32"))]
    code = (
        "import os, resource\nfrom edgeclip.cli import main\n"
        "from edgeclip.device import preprocess\n"
        "before = preprocess.open_image\n"
        "def without_files(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "    return before(*a)\n"
        "from edgeclip.device import bundle; bundle.open_image = without_files\n"
        f"main({arguments!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cat.png: Too many open files; allow more open files: ulimit -n" in one_line(done)


def test_a_reader_that_goes_away(cat, shipped_bundle):
    """`edgeclip ... | head -0`: no traceback."""
    command = [*COMMAND, "classify", *[str(cat)] * 50, "--bundle", shipped_bundle("onnx-fp32")]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert "Traceback" not in done.stderr, done.stderr


def test_a_terminal_that_is_gone_ends_no_work(cat, shipped_bundle):
    """stderr on a terminal whose other end was closed: progress is lost, the answer is not."""
    ours, theirs = os.openpty()
    os.close(ours)
    command = [*COMMAND, "classify", str(cat), "--bundle", str(shipped_bundle("onnx-fp32"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    assert done.returncode == 0 and "probability" in done.stdout


def test_the_working_folder_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
        "from edgeclip.cli import main; main(['report'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode == 1, done.stderr

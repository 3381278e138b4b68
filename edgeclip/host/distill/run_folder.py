"""A run's folder: whose it is, where its data lie, and `runs/latest` beside it."""

import contextlib
import secrets
import shutil
from pathlib import Path

from edgeclip import disk, text_file
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from edgeclip.host.recipe import Recipe
from edgeclip.progress import say

FIRST = ("roots.json", "recipe.yaml", "recipe.json")
"""what `claim` writes, in that order"""
PAST = (".history.json", ".answers.json")
"""endings of reports that outlive their run: the next student is compared with the last one"""


def place(out: Path) -> Path:
    """Return the run folder that `out` names.

    It is resolved where it is a link (runs/latest) or has no name of its own ("."), since `latest`
    will link to that name.
    """
    if out.is_symlink() or out.name in ("", ".."):
        return out.resolve()
    return out


def check_claim(run: Path, asked: Recipe, fresh: bool) -> None:
    """Raise where the folder holds a run of another recipe, or something that is no run."""
    if fresh and Path.cwd().is_relative_to(run.resolve()):
        raise EdgeclipError(
            run,
            "is the working folder, and --fresh deletes it",
            "run the command from another folder",
        )
    if (run / "recipe.json").exists():
        if not fresh:
            _refuse_other_recipe(run, asked)
    elif run.exists() and not _is_beginning(run):
        raise EdgeclipError(run, "is not empty and not a run", "choose another --out")


def _is_beginning(run: Path) -> bool:
    """Return whether a folder is empty, or what a process that was killed in `claim` left."""
    for path in run.iterdir():
        past = path.name == "reports" and path.is_dir() and all(map(_is_past, path.iterdir()))
        if not (path.name in FIRST or path.name.startswith(".") or past):
            return False
    return True


def _is_past(path: Path) -> bool:
    return path.name.endswith(PAST) and path.is_file()


def _refuse_other_recipe(run: Path, asked: Recipe) -> None:
    before = recipe.description(recipe.of_run(run))
    different = disk.differences(before, recipe.description(asked))
    if different:
        raise EdgeclipError(
            run,
            f"holds a run of another recipe ({'; '.join(different[:5])})",
            "use --fresh to start over, or another --out",
        )


def claim(run: Path, path: Path, asked: Recipe, fresh: bool) -> None:
    """Make the run folder this run's; path: of the recipe, as it was written."""
    written = text_file.read(path)  # it may be the run's own copy
    if fresh and run.exists():
        _empty(run)
    # Also when resuming: data may have moved.
    disk.write_sealed(run / "roots.json", recipe.roots(asked))
    if (run / "recipe.json").exists():
        say(f"{run}: resuming")
    else:
        disk.write_text(run / "recipe.yaml", written)
        disk.write_sealed(run / "recipe.json", recipe.description(asked))
    for folder in run.iterdir():  # what a process left that was killed
        disk.sweep(folder)


def _empty(run: Path) -> None:
    """Remove what lies in a run's folder; the folder stays, since it may be a mount point.

    What was measured before stays too, in short (`PAST`).

    The manifest goes first and the recipe last: half of it is neither finished nor somebody's.
    Raises `EdgeclipError` for a bundle that another command writes; one that is read is waited for.
    """
    with contextlib.ExitStack() as stack:
        for bundle in disk.finished_in(run / "bundles"):
            stack.enter_context(disk.locked(bundle))
            stack.enter_context(disk.unread(bundle))
        _remove_all(run)


def _remove_all(run: Path) -> None:
    order = {disk.MANIFEST: 0, "recipe.json": 2}
    for path in sorted(run.iterdir(), key=lambda path: order.get(path.name, 1)):
        if path.name == "reports" and path.is_dir() and not path.is_symlink():
            for report in path.iterdir():
                if not _is_past(report):
                    _remove(report)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def move_data(run: Path, asked: Recipe) -> None:
    """Write where the data of a finished run lie now.

    Raises `EdgeclipError` for a folder that does not exist.
    """
    roots = recipe.roots(asked)
    for root in roots.values():
        if not Path(root).is_dir():
            raise EdgeclipError(
                root, "there is no such folder", "say where the data lie: --data NAME=DIR for each"
            )
    disk.write_sealed(run / "roots.json", roots)


def mark_latest(run: Path) -> None:
    """Let `runs/latest` (beside the run) point to the newest finished run.

    A disk that knows no links, as of USB sticks, has no `latest`, which is said.
    """
    latest = run.parent / "latest"
    for left in run.parent.glob(".latest.*"):
        if left.is_symlink():
            left.unlink(missing_ok=True)
    temporary = run.parent / f".latest.{secrets.token_hex(8)}"
    try:
        temporary.symlink_to(run.name)
    except OSError as e:
        say(f"{latest}: not made ({e.strerror}); name this run with --run {run}")
        return
    if latest.is_symlink() or not latest.exists():
        try:
            temporary.replace(latest)
        except FileNotFoundError:  # another process took it for left behind
            mark_latest(run)
    else:
        temporary.unlink()

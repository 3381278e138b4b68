"""A run's folder: whose it is, where its data lie, and `runs/latest` beside it."""

import os
import shutil
from pathlib import Path

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from edgeclip.host.recipe import Recipe
from edgeclip.progress import say


def place(out: Path) -> Path:
    """`out` as it was said; resolved where it is a link (runs/latest) or has no name of its own ("."), since `latest` will link to that name."""
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def check_claim(run: Path, asked: Recipe, fresh: bool) -> None:
    """Raises when the run folder holds a run of another recipe, or something that is no run."""
    if fresh and Path.cwd().is_relative_to(run.resolve()):
        raise EdgeclipError(
            run, "is where you are, and --fresh deletes it", "call it from another folder"
        )
    if (run / "recipe.json").exists():
        different = (
            []
            if fresh
            else disk.differences(recipe.description(recipe.of_run(run)), recipe.description(asked))
        )
        if different:
            raise EdgeclipError(
                run,
                f"holds a run of another recipe ({'; '.join(different[:5])})",
                "use --fresh to start over, or another --out",
            )
    elif run.exists() and any(run.iterdir()):
        raise EdgeclipError(run, "is not empty and not a run", "choose another --out")


def claim(run: Path, path: Path, asked: Recipe, fresh: bool) -> None:
    """Makes the run folder ours."""
    written = path.read_text(encoding="utf-8")  # it may be the run's own copy
    if fresh and run.exists():
        shutil.rmtree(run)
    disk.write_json(
        run / "roots.json", recipe.roots(asked)
    )  # also when resuming: data may have moved
    if (run / "recipe.json").exists():
        say(f"{run}: resuming")
    else:
        disk.write_text(run / "recipe.yaml", written)
        disk.write_json(run / "recipe.json", recipe.description(asked))


def move_data(run: Path, asked: Recipe) -> None:
    """What `--data` says of a finished run. Raises `EdgeclipError` for a folder that is not there."""
    if missing := next(
        (root for root in recipe.roots(asked).values() if not Path(root).is_dir()), None
    ):
        raise EdgeclipError(
            missing, "there is no such folder", "say where the data lie: --data NAME=DIR for each"
        )
    disk.write_json(run / "roots.json", recipe.roots(asked))


def mark_latest(run: Path) -> None:
    """`runs/latest` (beside the run) points to the newest finished run."""
    latest = run.parent / "latest"
    temporary = run.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.name)
    if latest.is_symlink() or not latest.exists():
        os.replace(temporary, latest)
    else:
        temporary.unlink()

"""What one process of a session makes and every process of it reads: pytest-xdist gives each
worker fixtures of its own.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

EXPORTED = os.environ.get("EDGECLIP_TEST_BUNDLES")
"""A folder of the toy's bundles and its evaluation, made where torch is, for tests/device where it
is not.
"""


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the session's folder `name`, which `make` fills in the process that asks first; the
    others wait for it.

    What it holds is read only, and the same whichever process makes it.
    """
    from filelock import FileLock

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(root / "shared" / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an attempt that failed has left
            make(folder)
            done.touch()
    return folder


def exported(name: str) -> Path:
    """Return what was made beforehand under this name, or skip the test."""
    folder = Path(str(EXPORTED)) / name
    if not folder.exists():
        pytest.skip(f"{name} is not in {EXPORTED}: export it there, or install 'edgeclip[train]'")
    return folder

"""Environments of peers that want other packages than edgeclip's: theirs above, and below them all
that is installed here.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CLIP_BENCHMARK = ("clip-benchmark==1.6.2", "numpy<2.4", "requests")
"""1.6.2 counts by what NumPy 2.4 took away, and imports requests without naming it"""


def make(folder: Path, packages: tuple[str, ...]) -> Path:
    """Return the Python of the environment at `folder`, which is made where it is not there.

    It has `packages` and sees this one's. Raises CalledProcessError where pip cannot get them.
    """
    python = folder / "bin" / "python"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        below = folder / "lib" / version / "site-packages" / "zz_host.pth"
        below.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
        except BaseException:
            shutil.rmtree(folder)  # the next call would take it for whole
            raise
    return python

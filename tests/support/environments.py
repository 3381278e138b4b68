"""Python environments of peers, made once a session; a variable may name a folder that has one
already.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import REPO
from tests.support.shared import once

sys.path.insert(0, str(REPO / "benchmarks"))
from environments import CLIP_BENCHMARK, make

PACKAGES = {
    "clip-benchmark": CLIP_BENCHMARK,
    "optimum-onnx": ("optimum-onnx==0.1.0",),
    "optimum-intel": ("optimum-intel==2.2.0",),
}


def python_with(package: str, factory: pytest.TempPathFactory) -> Path:
    """Return a Python that has `package` and sees this one's, or skip the test: they want older
    packages than this has.
    """
    wanted = PACKAGES[package]
    variable = f"EDGECLIP_{package.upper().replace('-', '_')}"
    try:
        if variable in os.environ:
            return make(Path(os.environ[variable]), wanted)
        folder = once(factory, package, lambda path: make(path, wanted))
    except subprocess.CalledProcessError:
        pytest.skip(
            f"no {package}: pip install {' '.join(wanted)}, in an environment of its own that {variable} names"
        )
    return folder / "bin" / "python"

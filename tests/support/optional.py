"""What a test needs and an install may lack."""

import importlib

import pytest


def require(module: str, install_line: str) -> object:
    """The optional module, or a skip that says how to install it (a failure under
    EDGECLIP_REQUIRE=all).
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{module} is not installed: {install_line}")

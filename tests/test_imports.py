"""The public names, and those of edgeclip 0.1."""

import importlib
import subprocess
import sys

import pytest

import edgeclip


def test_the_public_names_are_those_of_the_readme():
    from edgeclip import Bundle, EdgeclipError
    from edgeclip.bundle import Bundle as Face
    from edgeclip.bundle import bake_labels
    from edgeclip.device import bundle
    from edgeclip.errors import EdgeclipError as Error

    assert Bundle is Face is bundle.Bundle
    assert bake_labels is bundle.bake_labels
    assert EdgeclipError is Error


@pytest.mark.parametrize("old", sorted(edgeclip.MOVED))
def test_a_module_of_0_1_is_imported_from_where_it_is_now(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {edgeclip.MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(edgeclip.MOVED[old])


def test_the_warning_names_the_line_that_imports():
    code = "import edgeclip\nfrom edgeclip.validate import validate\nprint(validate.__module__)"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "edgeclip.device.validate\n"
    assert "<string>:2: DeprecationWarning: edgeclip.validate is now" in done.stderr


def test_what_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("edgeclip.nothing")
    with pytest.raises(AttributeError):
        _ = edgeclip.nothing

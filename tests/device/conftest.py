"""What the tests of the device layer need where there is no torch, as on a board."""

import ast
import importlib.util


def pytest_ignore_collect(collection_path):
    """Leave out a file that compares with torch or onnx, where torch is not installed."""
    if collection_path.suffix != ".py" or importlib.util.find_spec("torch"):
        return None
    host = ("torch", "onnx", "edgeclip.host", "tests.support.tokens")
    for node in ast.parse(collection_path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        else:
            continue
        if any((name + ".").startswith(tuple(f"{h}." for h in host)) for name in names):
            return True
    return None

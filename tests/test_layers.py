"""The device layer never imports torch, and no file grows past reading."""

import subprocess
import sys
from pathlib import Path

import pytest

import edgeclip

PACKAGE = Path(edgeclip.__file__).parent
HOST = (
    "cache",
    "ranks",
    "students",
    "prompts",
    "inherit",
    "share",
    "stem",
    "fold",
    "weights",
    "teachers",
    "data",
    "distill",
    "export",
)
HEAVY = (
    "torch",
    "torchvision",
    "onnx",
    "open_clip",
    "timm",
    "matplotlib",
    "transformers",
    "jaxtyping",
)
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for p in PACKAGE.rglob("*.py")
)
DEVICE = [m for m in MODULES if not (m + ".").startswith(tuple(f"edgeclip.{h}." for h in HOST))]


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_device_layer_is_whole():
    named = "errors disk config preprocess metrics zero_shot pictures progress tokenizer target machine device bundle validate bench doctor report starter recipe cli"
    assert {f"edgeclip.{m}" for m in named.split()} | {
        "edgeclip.device.runtime.onnxruntime",
        "edgeclip.device.runtime.openvino",
        "edgeclip.device.runtime.null",
    } <= set(DEVICE)


def test_no_module_of_the_device_layer_imports_a_host_package():
    lines = fresh(
        "import importlib, sys\n"
        f"for name in {DEVICE!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as e:\n"
        "        if (e.name or '').split('.')[0] not in ('onnxruntime', 'openvino', 'tensorrt'): raise\n"
        f"    found = [h for h in {HEAVY!r} if h in sys.modules]\n"
        "    if found: print(name, found); break\n"
    )
    assert lines == ""


@pytest.mark.parametrize(
    "module", ["edgeclip.device.bundle", "edgeclip.device.validate", "edgeclip.device.bench"]
)
def test_a_device_module_alone_imports_no_runtime(module):
    assert (
        fresh(
            f"import sys, {module}; print([m for m in ('onnxruntime', 'openvino', *{HEAVY!r}) if m in sys.modules])"
        )
        == "[]"
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["distill", "--help"], ["export", "--help"], ["validate", "--help"]]
)
def test_help_imports_neither_torch_nor_a_runtime_nor_numpy(arguments):
    heavy = (*HEAVY, "onnxruntime", "openvino", "numpy", "PIL")
    code = (
        "import sys\n"
        "from edgeclip.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as e: assert not e.code\n"
        f"print('loaded:', [m for m in {heavy!r} if m in sys.modules])"
    )
    assert fresh(code).splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_module_has_at_most_470_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 470


def test_a_test_file_has_at_most_400_lines():
    long = {
        p.name: n
        for p in Path(__file__).parent.rglob("*.py")
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long

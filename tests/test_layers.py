"""The folder is the rule: what a board gets never imports torch, and no folder imports one that
stands above it.
"""

import ast
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import edgeclip
from edgeclip.boards import runner

PACKAGE = Path(edgeclip.__file__).parent
GROUND = "ground"
GROUND_FOLDERS = ("disk", "text_file")
"""folders of the ground; its other modules are files"""
WINGS = [[GROUND], ["device"], ["reports"], ["boards", "host"], ["cli"]]
"""the wings from below; those on one floor do not import each other"""
HOST = [
    ["distributed", "allocator", "older", "blocks"],
    ["recipe"],
    ["data", "towers"],
    ["teachers", "graph"],
    ["cache"],
    ["student"],
    ["adapt"],
    ["evaluation", "export"],
    ["distill"],
]
"""the rooms of host/ from below, in the order of the data's way; those on one floor may import
each other one way
"""
HEAVY = ("torch", "torchvision", "onnx", "open_clip", "timm", "matplotlib", "transformers")
BLOCKED = (*HEAVY, "jaxtyping", "click", "jinja2")
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module of edgeclip that the file at `path` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "edgeclip"}


def wing(name: str) -> str:
    part = [*name.split("."), ""][1]
    if part in GROUND_FOLDERS:
        return GROUND
    return part if (PACKAGE / part / "__init__.py").exists() and part else GROUND


def room(name: str) -> str | None:
    """The room of host/ that a module is in; None: another wing's."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "host" else None


def floor(floors: list[list[str]], name: str) -> int:
    return next(i for i, names in enumerate(floors) if name in names)


FACES = ("edgeclip", "edgeclip.bundle", "edgeclip.clip_benchmark", "edgeclip.__main__")
"""what users import or start: each hands on to the wing that has it"""
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if module(p) not in FACES]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_import_goes_upward(path):
    own = wing(module(path))
    for name in imports(path):
        theirs = wing(name)
        if theirs != own:
            assert floor(WINGS, theirs) < floor(WINGS, own), f"{module(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if room(module(p))], ids=module)
def test_the_rooms_of_the_host_stand_in_the_order_of_the_data(path):
    own = room(module(path))
    for name in imports(path):
        theirs = room(name)
        if theirs not in (None, own):
            assert floor(HOST, theirs) <= floor(HOST, own), f"{module(path)} imports {name}"


def test_there_is_no_circle_of_files():
    modules = {module(p): p for p in sorted(PACKAGE.rglob("*.py"))}
    edges = {}
    for name, path in modules.items():
        found = {n if n in modules else n.rpartition(".")[0] for n in imports(path)}
        edges[name] = {n for n in found if n in modules and n != name}
    while free := [name for name, needs in edges.items() if not needs & edges.keys()]:
        for name in free:
            del edges[name]
    assert edges == {}


def test_every_module_of_the_device_layer_lives_without_torch():
    names = [module(p) for p in sorted((PACKAGE / "device").rglob("*.py"))]
    fresh(
        "import importlib, sys\n"
        f"for name in {BLOCKED!r}: sys.modules[name] = None\n"
        f"for name in {names!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as e:\n"
        f"        if (e.name or '').split('.')[0] not in {RUNTIMES!r}: raise\n"
    )


def test_a_board_gets_the_device_layer_and_the_ground_alone():
    names = zipfile.ZipFile(BytesIO(runner.device_layer())).namelist()
    wings = {
        wing(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) for name in names
    }
    assert wings == {GROUND, "device"}
    assert len(names) <= 62


@pytest.mark.parametrize(
    "name", ["edgeclip.bundle", "edgeclip.device.validate", "edgeclip.device.bench"]
)
def test_a_device_module_alone_imports_no_runtime(name):
    heavy = (*RUNTIMES, *HEAVY)
    assert fresh(f"import sys, {name}; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["distill", "--help"], ["export", "--help"], ["validate", "--help"]]
)
def test_help_imports_neither_torch_nor_a_runtime_nor_numpy(arguments):
    heavy = (*HEAVY, *RUNTIMES, "numpy", "PIL")
    code = (
        "import sys\n"
        "from edgeclip.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as e: assert not e.code\n"
        f"print('loaded:', [m for m in {heavy!r} if m in sys.modules])"
    )
    assert fresh(code).splitlines()[-1] == "loaded: []"

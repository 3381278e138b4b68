"""The built wheel with one inference runtime, outside the checkout and without torch, does all
that a device needs.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import REPO
from tests.support.images import encoded, toy_image

PYTHON_310 = shutil.which("python3.10") or next(
    iter(sorted(glob.glob(str(Path.home() / ".pyenv/versions/3.10*/bin/python")))), None
)


def works(python):
    return (
        python is not None
        and subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0
    )


if not works(
    PYTHON_310
):  # pyenv's shim is there for every version, and fails for one that is not chosen
    PYTHON_310 = next(
        (
            p
            for p in sorted(glob.glob(str(Path.home() / ".pyenv/versions/3.10*/bin/python")))
            if works(p)
        ),
        None,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(REPO)],
        check=True,
        cwd=folder,
    )
    (found,) = folder.glob("edgeclip-*.whl")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [pytest.param(sys.executable, id="this python"), pytest.param(PYTHON_310, id="python 3.10")],
)
def test_a_device_needs_the_wheel_and_one_runtime_only(wheel, shipped_bundle, tmp_path, base):
    if base is None:
        pytest.skip("no Python 3.10 with venv: install one (pyenv install 3.10)")
    here = tmp_path / "board"
    (here / "devices").mkdir(parents=True)
    (here / "devices" / "board.yaml").write_text(
        "runtimes: [onnxruntime]\nbench: {min_duration_s: 0.1, min_query_count: 20}\n"
    )
    (here / "cat.png").write_bytes(encoded(toy_image(1)))
    (here / "words.txt").write_text("pear\nplum\n")
    shutil.copytree(shipped_bundle("onnx-int8"), here / "bundle")
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "VIRTUAL_ENV", "PYENV_VERSION", "EDGECLIP"))
    }
    subprocess.run([base, "-m", "venv", str(tmp_path / "venv")], check=True, env=environment)
    python = tmp_path / "venv" / "bin" / "python"

    def call(*arguments, code=0):
        done = subprocess.run(
            [str(a) for a in arguments], cwd=here, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def edgeclip(*arguments, code=0):
        return call(python.parent / "edgeclip", *arguments, code=code)

    call(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel, "onnxruntime")
    absent = call(
        python,
        "-c",
        "import importlib.util as u; print([m for m in ('torch', 'onnx', 'open_clip', 'timm', 'matplotlib') if u.find_spec(m)])",
    )
    assert absent.strip() == "[]"
    assert str(tmp_path / "venv") in call(python, "-c", "import edgeclip; print(edgeclip.__file__)")

    names = {(r["kind"], r["name"]) for r in json.loads(edgeclip("list", "--json"))}
    assert names >= {
        ("recipe", "quickstart"),
        ("target", "onnx-int8"),
        ("device", "host-cpu"),
        ("device", "board"),
    }
    (parity,) = json.loads(
        edgeclip("validate", "--bundle", "bundle", "--device", "board", "--json", code=4)
    )
    assert parity["verdict"] == "cannot tell"
    assert parity["failures"] == []
    assert parity["golden"]["largest_pixel_difference"] == 0
    (bench,) = json.loads(edgeclip("bench", "--bundle", "bundle", "--device", "board", "--json"))
    assert bench["single_stream"]["queries"] >= 20
    assert bench["offline"]["images_per_second"] > 0
    assert bench["cold_start"]["process_ms"] > 0
    assert (
        len(json.loads(edgeclip("classify", "cat.png", "--bundle", "bundle", "--json"))["cat.png"])
        == 5
    )
    assert parity["golden"]["text_cosine_min"] is None  # no tokenizer: not compared, and no guess
    labels = [python.parent / "edgeclip", "labels", "bundle", "words.txt", "--out", "fruit"]
    call(*labels, code=1)
    assert not (here / "fruit").exists()
    call(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{wheel}[text]")
    call(*labels)
    rows = json.loads(edgeclip("classify", "cat.png", "--bundle", "fruit", "--json"))["cat.png"]
    assert {r["label"] for r in rows} == {"pear", "plum"}
    edgeclip("embed", "cat.png", "--bundle", "bundle", "--out", "f.npy")
    assert call(python, "-c", "import numpy as np; print(np.load('f.npy').shape[0])").strip() == "1"
    done = subprocess.run(
        [str(python.parent / "edgeclip"), "distill", "quickstart.yaml"],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'edgeclip[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_device_layers_own_tests_pass_on_python_310_with_one_runtime(
    shipped_bundle, evaluation, tmp_path
):
    if not works(PYTHON_310):
        pytest.skip("no Python 3.10 with venv: install one (pyenv install 3.10)")
    for name in ("onnx-fp32", "onnx-fp16", "onnx-int8", "openvino-fp16", "tensorrt-fp16"):
        shutil.copytree(shipped_bundle(name), tmp_path / "toy" / name)
    shutil.copytree(evaluation, tmp_path / "toy" / "evaluation")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "EDGECLIP"))
    }
    kept.pop("VIRTUAL_ENV", None)
    environment = kept | {"EDGECLIP_TEST_BUNDLES": str(tmp_path / "toy")}
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([PYTHON_310, "-m", "venv", str(tmp_path / "venv")], check=True, env=environment)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, f"{REPO}[onnxruntime,text]", "pytest"], check=True, env=environment)
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "tests/device"]
    done = subprocess.run(tests, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 150, done.stdout[-300:]

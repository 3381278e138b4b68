"""An ARM board that is none: aarch64 code under qemu behind a real sshd gives the answers of x86,
and no times.
"""

import json
import shutil

import msgspec
import numpy as np
import pytest

from edgeclip.boards.board import Board
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import load_evaluation
from edgeclip.device.profile import load as load_device
from tests.support.command import run
from tests.support.toy_bundle import LABELS, write_evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools():
    for tool, package in (
        ("sshd", "openssh-server"),
        ("qemu-aarch64-static", "qemu-user-static"),
        ("debootstrap", "debootstrap"),
    ):
        if shutil.which(tool, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin") is None:
            pytest.skip(f"{tool} is not installed: apt install {package}")


def vit_source(source):
    """The toy's source with a small vision transformer in place of its convolutions."""
    import timm
    import torch

    from edgeclip.host.student import Student

    torch.manual_seed(4)
    tower = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0
    )
    student = Student(tower, tower.num_features, 16, 24).eval()
    return source._replace(image_encoder=student, head=None)


@pytest.fixture(scope="module")
def bundles(source, shipped_bundle, tmp_path_factory, tools):
    """(bundles, evaluation folder) of a convolutional and a ViT student, in float and in S8S8."""
    from edgeclip.host.export import export
    from tests.support.toy_bundle import toy_target

    folder = tmp_path_factory.mktemp("emulated")
    found = {}
    for kind, of in (("cnn", source), ("vit", vit_source(source))):
        evaluation = write_evaluation(folder / kind / "evaluation", of, 60)
        paths = [
            export(of, t, toy_target(t), folder / kind / "bundles" / t)
            for t in ("onnx-fp32", "onnx-int8-arm")
        ]
        found[kind] = ([Bundle.load(p) for p in paths], evaluation)
    return found


def observed(name, kind, bundles):
    loaded, folder = bundles[kind]
    evaluation = load_evaluation(folder)
    _, device = load_device(name)
    device = msgspec.structs.replace(device, packages=("onnxruntime==1.26.0",))
    with Board(name, device) as board:
        board.prepare(loaded, evaluation)
        return [board.observe(b, evaluation) for b in loaded]


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_fp32_and_s8s8_answer_as_on_x86_with_the_same_onnxruntime(bundles, kind):
    for bundle, arm, x86 in zip(
        bundles[kind][0],
        observed("arm64-emulated", kind, bundles),
        observed("loopback", kind, bundles),
        strict=True,
    ):
        assert arm.ran.version == x86.ran.version == "1.26.0"
        assert (
            arm.arrays["golden_pixels"] == x86.arrays["golden_pixels"]
        ).all()  # PIL's resize is the same on both
        a, b = arm.arrays["features_all"].astype(np.float64), x86.arrays["features_all"]
        assert (a * b).sum(axis=1).min() > (0.99999 if "fp32" in bundle.folder.name else 0.99)
        from edgeclip.device.evaluation import decide

        evaluation = load_evaluation(bundles[kind][1])
        margin = decide(bundle, evaluation, x86.arrays["features_all"]).lead
        unlike = arm.arrays["answers"] != x86.arrays["answers"]
        assert not (unlike & (margin >= 1e-3)).any()
        assert len(unlike) == 60
        assert len(LABELS) == 6


def test_the_verbs_go_there_and_timings_are_refused(bundles, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(bundles["cnn"][1], run_folder / "evaluation")
    shutil.copytree(bundles["cnn"][0][0].folder, run_folder / "bundles" / "onnx-fp32")
    result = run(
        "validate",
        "--run",
        run_folder,
        "--device",
        "arm64-emulated",
        "--images-limit",
        20,
        "--json",
    )
    (report,) = json.loads(result.stdout)
    # Twenty images are few, but no answer of the float model can change on another processor.
    assert result.exit_code == 0 and report["verdict"] == "holds"
    assert report["failures"] == []
    assert report["images"] == 20
    assert report["machine"]["arch"] == "aarch64"
    assert report["machine"]["emulated"] and report["golden"]["largest_pixel_difference"] == 0
    result = run("bench", "--run", run_folder, "--device", "arm64-emulated", "--json")
    (report,) = json.loads(result.stdout)
    assert result.exit_code == 3 and report["failures"][0].startswith(
        "timings refused: the processor is emulated"
    )
    assert report["single_stream"] is None
    assert report["offline"] is None
    assert report["cold_start"] is None


@pytest.mark.parametrize(("cpu", "dot_product"), [("cortex-a72", False), ("cortex-a76", True)])
def test_cores_with_and_without_dot_product_are_told_apart(tools, cpu, dot_product):
    name, device = load_device("arm64-emulated")
    device = msgspec.structs.replace(
        device, reach=msgspec.structs.replace(device.reach, emulate=cpu)
    )
    with Board(name, device) as board:
        assert ("asimddp" in board.facts.isa) == dot_product and board.facts.emulated
        assert "processor" in {r.check for r in board.preflight([], None) if r.status == "warn"}

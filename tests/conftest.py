"""Fixtures and hooks of every test: the tiny student, its bundles and its evaluation folder; a
command line in an empty folder.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.images import encoded, toy_image
from tests.support.optional import require
from tests.support.shared import EXPORTED, exported, once
from tests.support.toy_bundle import (
    LABELS,
    SIZE,
    WIDTH,
    export_tiny_clip,
    torch_student,
    toy_target,
    toy_text,
    write_evaluation,
)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if (
        os.environ.get("EDGECLIP_REQUIRE") == "all"
        and report.skipped
        and not hasattr(report, "wasxfail")
    ):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("data:"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: EDGECLIP_REQUIRE=all, and it was skipped ({reason})"


@pytest.fixture(scope="session")
def student():
    require("torch", "pip install 'edgeclip[train]'")
    return torch_student()


@pytest.fixture(scope="session")
def preprocess():
    from edgeclip.device.preprocess import Preprocess

    return Preprocess(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """48 images in one folder."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(48):
        toy_image(1000 + i, 40 + i % 7, 40 + i % 5).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def source(student, preprocess, photos):
    """What `export` takes: the tiny student with a text side, labels and an EduAttention head."""
    import torch

    from edgeclip.device import tokenizer
    from edgeclip.device.images import index_folder
    from edgeclip.device.zero_shot import EduAttention, ensemble, prompts
    from edgeclip.host.export.source import Source

    text, templates = toy_text(), ["a photo of a {c}", "a {c}"]
    ids = tokenizer.encode(text.words(), prompts(LABELS, templates))
    with torch.inference_mode():
        features = text.module(torch.from_numpy(ids)).numpy()
    rng = np.random.default_rng(0)
    images = index_folder(photos)
    return Source(
        image_encoder=student,
        preprocess=preprocess,
        load_text=lambda: text,
        labels=LABELS,
        templates=templates,
        class_features=ensemble(features.reshape(len(LABELS), len(templates), -1)),
        head=EduAttention(
            (rng.normal(size=(WIDTH, WIDTH)) / 4).astype(np.float32),
            np.zeros(WIDTH, np.float32),
            0.1,
            0.1,
        ),
        logit_scale=20.0,
        calibration=lambda: images[8:],
        evaluation_hashes=set,
        golden=images[:4],
        golden_license="made up",
        licenses={"teacher": "made up", "data": "made up"},
        parents={"student": "0" * 64},
    )


@pytest.fixture(scope="session")
def shipped_bundle(request, tmp_path_factory) -> Callable[[str], Path]:
    """The toy's bundle for a target, exported once; read only."""

    def make(name: str, folder: Path) -> None:
        from edgeclip.host.export import export

        export(request.getfixturevalue("source"), name, toy_target(name), folder)

    def get(name: str) -> Path:
        if EXPORTED:
            return exported(name)
        if "openvino" in name:
            require("nncf", "pip install 'edgeclip[openvino]'")
        return once(tmp_path_factory, name, lambda folder: make(name, folder))

    return get


@pytest.fixture(scope="session")
def clip_bundle(tmp_path_factory) -> Path:
    """A bundle of a tiny open_clip model, with CLIP's own tokenizer; read only."""
    require("open_clip", "pip install 'edgeclip[train]'")
    return once(tmp_path_factory, "clip", export_tiny_clip)


@pytest.fixture(scope="session")
def clip_pack(clip_bundle, tmp_path_factory) -> Path:
    """The conformance pack of that bundle; read only."""
    from edgeclip.device.bundle import Bundle
    from edgeclip.host.evaluation.conformance import pack_for

    return once(tmp_path_factory, "pack", lambda f: pack_for(Bundle.load(clip_bundle), f))


@pytest.fixture
def own_bundle(shipped_bundle, tmp_path) -> Callable[[str], Path]:
    """A copy that a test may break."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(shipped_bundle(name), tmp_path / "bundle"))

    return get


@pytest.fixture(scope="session")
def evaluation(request, tmp_path_factory) -> Path:
    """600 images: enough for a margin of half a percentage point."""
    if EXPORTED:
        return exported("evaluation")
    source = request.getfixturevalue("source")
    return write_evaluation(tmp_path_factory.mktemp("run") / "evaluation", source, 600)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cat(here):
    (here / "cat.png").write_bytes(encoded(toy_image(1)))
    return here / "cat.png"

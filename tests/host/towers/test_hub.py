"""Repositories of a hub, by a server on this machine: what comes is one commit, and what does not
come is said in one line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from edgeclip import disk
from tests.support.hub import Hub
from tests.support.images import toy_image

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
TIMM = "test_vit"
"""timm's smallest"""
SCRIPT = """
import json, sys
import torch
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.towers import weights

library, model, named = sys.argv[1:]
try:
    if library == "open_clip":
        spec = OpenClip(model=model, weights=named)
        net, preprocess = weights.open_clip_model(spec)
        torch.manual_seed(0)
        x = torch.rand(2, 3, preprocess.size, preprocess.size)
        rows = net.encode_image(x)
    else:
        spec = Timm(model=model, weights=named, image_size=160, crop_pct=None)
        net, preprocess = weights.timm_model(spec, num_classes=None)
        torch.manual_seed(0)
        rows = net(torch.rand(2, 3, 160, 160))
except EdgeclipError as e:
    print(json.dumps({"error": str(e)}))
else:
    print(json.dumps({
        "rows": rows.tolist(), "origin": weights.origin(spec), "mean": preprocess.mean,
        "resize": preprocess.interpolation, "size": preprocess.size, "crop": preprocess.crop,
    }))
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def ask(url, home, library, model, named, offline=False):
    """What edgeclip answers in a process of its own, with this hub and this cache."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, library, model, named],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def open_clips(folder: Path, seed: int = 0):
    """A repository of open_clip's, and its model."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**TINY).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


def timms(folder: Path):
    torch.manual_seed(3)
    model = timm.create_model(TIMM, num_classes=7).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    own = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear"}
    own |= {
        "crop_pct": 0.8,
        "input_size": [3, 160, 160],
        "num_classes": 7,
        "fixed_input_size": True,
    }
    config = {"architecture": TIMM, "num_classes": 7, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def answers(model, size):
    torch.manual_seed(0)
    with torch.inference_mode():
        return model(torch.rand(2, 3, size, size)).numpy()


def test_a_repository_of_open_clip_gives_its_own_features_at_a_commit(hub, tmp_path):
    first = open_clips(tmp_path / "first")
    second = open_clips(tmp_path / "second", seed=1)
    commits = [hub.commit("lab/tiny", tmp_path / name) for name in ("first", "second")]
    cases = {"hub:main": (second, commits[1]), f"hub:{commits[0]}": (first, commits[0])}
    for named, (model, commit) in cases.items():
        found = ask(hub.url, tmp_path / "home", "open_clip", "hf-hub:lab/tiny", named)
        assert found["origin"] == f"lab/tiny@{commit}"
        assert commit in found["stderr"]
        np.testing.assert_allclose(found["rows"], answers(model.encode_image, 32), atol=1e-6)
        assert (found["mean"], found["resize"]) == (PREPROCESS["mean"], "bilinear")


def test_a_repository_of_timm_gives_its_own_logits_and_preprocess(hub, tmp_path):
    model = timms(tmp_path / "files")
    commit = hub.commit("lab/vit", tmp_path / "files")
    found = ask(hub.url, tmp_path / "home", "timm", "hf-hub:lab/vit", "hub:main")
    assert found["origin"] == f"lab/vit@{commit}"
    np.testing.assert_allclose(found["rows"], answers(model, 160), atol=1e-6)
    assert (found["mean"], found["resize"], found["crop"]) == ([0.1, 0.2, 0.3], "bilinear", 0.8)


def test_a_tag_of_timm_is_pinned_by_its_revision(hub, tmp_path):
    model = timm.create_model(TIMM).eval()
    for name, change in (("old", 0.0), ("new", 1.0)):
        (tmp_path / name).mkdir()
        state = {k: v + change * (k == "head.bias") for k, v in model.state_dict().items()}
        save_file(state, tmp_path / name / "model.safetensors")
    old, _ = [hub.commit(f"timm/{TIMM}.r160_in1k", tmp_path / name) for name in ("old", "new")]
    plain = answers(model, 160)
    for named, change in (("hub:r160_in1k", 1.0), (f"hub:r160_in1k@{old}", 0.0)):
        found = ask(hub.url, tmp_path / "home", "timm", TIMM, named)
        np.testing.assert_allclose(found["rows"], plain + change, atol=1e-5)


def test_a_download_that_is_cut_off_goes_on_where_it_was(hub, tmp_path):
    model = open_clips(tmp_path / "files")
    hub.commit("lab/tiny", tmp_path / "files")
    hub.cut_after = 11 << 20  # the client asks for 10 MiB at a time
    found = ask(hub.url, tmp_path / "home", "open_clip", "hf-hub:lab/tiny", "hub:main")
    np.testing.assert_allclose(found["rows"], answers(model.encode_image, 32), atol=1e-6)
    assert "bytes=10485760-" in [ranged for _, _, ranged in hub.asked]


def test_what_is_in_the_cache_serves_where_there_is_no_hub(hub, tmp_path):
    model = open_clips(tmp_path / "files")
    commit = hub.commit("lab/tiny", tmp_path / "files")
    missing = ask(hub.url, tmp_path / "home", "open_clip", "hf-hub:lab/tiny", "hub:main", True)
    assert "not in the local cache" in missing["error"]
    ask(hub.url, tmp_path / "home", "open_clip", "hf-hub:lab/tiny", "hub:main")
    hub.close()
    for offline in (True, False):  # asked to be, or found to be
        found = ask(hub.url, tmp_path / "home", "open_clip", "hf-hub:lab/tiny", "hub:main", offline)
        assert found["origin"] == f"lab/tiny@{commit}"
        np.testing.assert_allclose(found["rows"], answers(model.encode_image, 32), atol=1e-6)


@pytest.mark.parametrize(
    ("library", "model", "named", "what"),
    [
        ("open_clip", "hf-hub:lab/none", "hub:main", "there is no repository lab/none"),
        ("open_clip", "hf-hub:lab/tiny", "hub:v9", "lab/tiny has no revision v9"),
        ("open_clip", "hf-hub:lab/gated", "hub:main", "is gated"),
        ("open_clip", "hf-hub:lab/tiny", "somewhere.bin", "write weights: hub:main"),
        ("timm", "hf-hub:lab/tiny", "hub:main", "has no config.json"),
        ("timm", TIMM, "hub:nonsense", "unknown pretrained tag"),
        ("open_clip", "ViT-B-32", "hub:nonsense", "unknown pretrained tag"),
        ("open_clip", "hf-hub:lab", "hub:main", "there is no repository lab"),
    ],
)
def test_what_does_not_come_is_one_line(hub, tmp_path, library, model, named, what):
    open_clips(tmp_path / "files")
    hub.commit("lab/tiny", tmp_path / "files")
    hub.commit("lab/gated", tmp_path / "files")
    hub.gated.add("lab/gated")
    found = ask(hub.url, tmp_path / "home", library, model, named)
    assert what in found["error"] and "\n" not in found["error"]


@pytest.mark.parametrize("library", [open_clips, timms])
def test_a_bundle_says_the_commit_it_was_made_of(hub, tmp_path, library):
    """Its golden answers are of the library's own transform, by the repository's configuration."""
    library(tmp_path / "files")
    for i in range(3):
        image = toy_image(i, 200 + i, 190)
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{i}.png")
    commit = hub.commit("lab/tiny", tmp_path / "files")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    asked = ["export", "--model", "hf-hub:lab/tiny", "--weights", "hub:main", "--out", "b"]
    command = [sys.executable, "-m", "edgeclip", *asked, "--target", "onnx-fp32"]
    command += ["--images", "photos"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = disk.read_json(next(tmp_path.glob("b/**/manifest.json")))
    assert manifest["parents"]["weights"] == f"lab/tiny@{commit}"

"""Checkpoints of every layout give the features of the classes that they come from, and what does
not fit says so in one line.
"""

import json
import math
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.towers import checkpoint, layouts, torchscript, weights
from tests.support.checkpoints import CNN
from tests.support.checkpoints import checkpoint_layouts as L
from tests.support.checkpoints import conform_weights as C

QUICK = ["TinyCLIP-ViT-8M-16", "SigLIP-B/16", "timm ViT"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", QUICK)
def test_every_layout_gives_the_reference_classs_features(name, tmp_path):
    found = C.cases(tmp_path, [name])
    assert len(found) >= len(L.LAYOUTS) + 1
    assert [case for case in found if not case.difference <= C.MOST] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in (*C.CLIPS, *C.TIMMS) if n not in QUICK])
def test_every_layout_of_the_large_ones(name, tmp_path):
    found = C.cases(tmp_path, [name])
    assert [case for case in found if not case.difference <= C.MOST] == []


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


def refused(file, model=None):
    with pytest.raises(EdgeclipError) as error:
        layouts.load_into(model or net(), checkpoint.read(str(file)), str(file))
    assert "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


def torch_file(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


BAD = {
    "a tensor": (torch.zeros(3), "holds a Tensor and no dictionary of tensors"),
    "a list": ([torch.zeros(3)], "holds a list"),
    "nothing": ({}, r"holds no tensors of weights \(nothing\)"),
    "words": ({"epoch": 3, "name": "x"}, r"holds no tensors of weights \(epoch, name\)"),
    "another prefix": (
        {f"clip.{k}": v for k, v in net().state_dict().items()},
        r"begin with 'clip\.'",
    ),
    "one missing": (
        {k: v for k, v in net().state_dict().items() if k != "0.bias"},
        r"1 missing \(first: 0\.bias\)",
    ),
    "one more": ({**net().state_dict(), "2.weight": torch.zeros(2)}, r"unknown \(first: 2\.weight"),
    "another shape": ({**net().state_dict(), "0.bias": torch.zeros(5)}, "of another shape"),
    "whole numbers": (
        {**net().state_dict(), "0.bias": torch.zeros(4, dtype=torch.int8)},
        r"of another type \(first: 0\.bias",
    ),
    "not a number": (
        {**net().state_dict(), "0.bias": torch.full((4,), math.nan)},
        "'0.bias' holds values that are not finite",
    ),
    "no end": (
        {**net().state_dict(), "0.bias": torch.full((4,), 1e300, dtype=torch.float64)},
        "not finite",
    ),
    "twice": (
        {**net().state_dict(), "module.0.bias": torch.zeros(4)},
        r"two of its tensors are '0\.bias'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_in_one_line(name, tmp_path):
    import re

    content, says = BAD[name]
    line = refused(torch_file(content, tmp_path))
    assert re.search(says, line), line


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("run",)

    line = refused(torch_file({"state_dict": net().state_dict(), "x": Trap()}, tmp_path))
    assert "could run code" in line and "print" in line
    line = refused(torch_file(net(), tmp_path))
    assert "Sequential" in line


FILES = {
    "empty": (b"", "is empty"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
    "cut off": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "not a readable weights file"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_none(name, suffix, tmp_path):
    content, says = FILES[name]
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    assert says in refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt", ""])
@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_file_is_known_by_its_content_whatever_it_is_called(write, suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    write(net(5).state_dict(), path)
    model = net()
    layouts.load_into(model, checkpoint.read(str(path)), "file")
    assert model[0].weight.equal(net(5)[0].weight)


def test_an_index_that_does_not_match_its_shards(tmp_path):
    state = net().state_dict()
    L.sharded(state, tmp_path)
    assert checkpoint.read(str(tmp_path)).keys() == state.keys()
    index = tmp_path / "model.safetensors.index.json"
    assert checkpoint.read(str(index)).keys() == state.keys()
    first = weights.source(str(tmp_path))
    one = tmp_path / "model-00001-of-00003.safetensors"
    assert "one shard of several: give the index" in refused(one)

    places = json.loads(index.read_text())
    kept = one.read_bytes()
    one.unlink()
    assert "is missing" in refused(tmp_path)
    save_file({"other": torch.zeros(1)}, one)
    assert "holds other tensors than" in refused(tmp_path)
    one.write_bytes(kept)
    assert weights.source(str(tmp_path)) == first
    places["weight_map"]["0.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(places))
    assert "names a file elsewhere" in refused(tmp_path)
    index.write_text("{}")
    assert "is no index of shards" in refused(tmp_path)


def test_a_folder_has_one_file_of_weights_or_is_refused(tmp_path):
    assert "has 0 weights files" in refused(tmp_path)
    save_file(net().state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.read(str(tmp_path)).keys() == net().state_dict().keys()
    save_file(net().state_dict(), tmp_path / "b.safetensors")
    assert "has 2 weights files" in refused(tmp_path)


def test_a_buffer_is_left_out_only_where_the_model_computes_the_same(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)

    state = Masked().state_dict()
    layouts.load_into(Masked(), {**state, "mask": torch.tensor([0.0, -math.inf])}, "x")
    file = torch_file({**state, "mask": torch.tensor([0.0, 1.0])}, tmp_path)
    assert "differs from what the model computes" in refused(file, Masked())
    file = torch_file({**state, "a.position_ids": torch.tensor([[1, 0]])}, tmp_path)
    assert "unknown (first: a.position_ids)" in refused(file, Masked())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_an_archive_of_torchscript_is_read_without_its_code(tmp_path):
    path = tmp_path / "archive.pt"
    torch.jit.script(net(4)).save(str(path))
    found = torchscript.tensors(path)
    expected = net(4).state_dict()
    assert found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)

    trap = tmp_path / "trap.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(trap, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                content = b"cos\nsystem\n(S'touch here'\ntR."
            new.writestr(name, content)
    assert "os.system is neither a tensor nor a module" in refused(trap)


@pytest.mark.parametrize("classes", [1, 2, 37, 1000, 1001])
def test_a_timm_classifier_has_the_classes_of_its_weights(classes, tmp_path):
    import timm

    theirs = L.lively(timm.create_model(CNN, num_classes=classes))
    file = torch_file(theirs.state_dict(), tmp_path)
    spec = R.Timm(model=CNN, weights=str(file), image_size=64)
    ours, _ = weights.timm_model(spec, num_classes=None)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=0)
        features = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        tower, _ = weights.timm_model(spec)
        torch.testing.assert_close(tower(x), features, atol=1e-6, rtol=0)


def test_weights_without_a_classifier_are_a_tower_and_no_classifier(tmp_path):
    import timm

    file = torch_file(timm.create_model(CNN, num_classes=0).state_dict(), tmp_path)
    spec = R.Timm(model=CNN, weights=str(file), image_size=64)
    weights.timm_model(spec)
    with pytest.raises(EdgeclipError, match=r"has no classifier \(classifier\.weight\)"):
        weights.timm_model(spec, num_classes=None)


def test_another_resolution_only_where_it_is_asked_for(tmp_path):
    """As open_clip does it."""
    import open_clip

    model = C.model_of("TinyCLIP-ViT-8M-16")
    small = json.loads(json.dumps(C.CLIPS["TinyCLIP-ViT-8M-16"]))
    small["vision_cfg"]["image_size"] = 160
    file = L.plain(model.state_dict(), tmp_path)
    config = {"model_cfg": small, "preprocess_cfg": C.DEFAULT}
    spec = R.OpenClip(model="own", weights=file, config=config)
    with pytest.raises(EdgeclipError, match="--resize-pos-embed"):
        weights.open_clip_model(spec)

    theirs = open_clip.CLIP(**small).eval()
    open_clip.load_checkpoint(theirs, file)
    spec = R.OpenClip(model="own", weights=file, config=config, resize_pos_embed=True)
    ours, preprocess = weights.open_clip_model(spec)
    assert preprocess.size == 160
    assert C.difference(ours, theirs) <= C.MOST


def test_a_timm_vit_of_another_resolution(tmp_path):
    import timm

    model = L.lively(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=160))
    file = torch_file(model.state_dict(), tmp_path)
    spec = {"model": "vit_tiny_patch16_224", "weights": str(file), "image_size": 224, "depth": 2}
    with pytest.raises(EdgeclipError, match=r"101 positions, the model has 197.*resize_pos_embed"):
        weights.timm_model(R.Timm(**spec))
    ours, _ = weights.timm_model(R.Timm(**spec, resize_pos_embed=True), num_classes=None)
    model.set_input_size(224)
    assert C.difference(ours, model) <= C.MOST

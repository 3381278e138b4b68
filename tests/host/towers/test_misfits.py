"""Weights that do not fit say why: following the advice leads to weights that do. An image tower
alone is enough where only that is wanted.
"""

import gzip
import tarfile
import zipfile

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.towers import checkpoint, layouts, weights
from tests.support.checkpoints import checkpoint_layouts as L
from tests.support.checkpoints import conform_weights as C

NAME = "TinyCLIP-ViT-8M-16"
KINDS = {
    "a linear layer": lambda: nn.Linear(3, 4),
    "a convolution": lambda: nn.Conv1d(3, 4, 1),
}


def net(make=KINDS["a linear layer"]):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(3), make()).eval()


def file_of(state, tmp_path):
    return L.torch_file(dict(state), tmp_path)


def refused(model, file):
    with pytest.raises(EdgeclipError) as error:
        layouts.load_into(model, checkpoint.read(file), file)
    line = str(error.value)
    assert "\n" not in line and "do not fit the model" in line
    return line.rpartition("; ")[2]


# --- a weight in parts


def peft_of(state, whole):
    """As peft names a LoRA adapter: its two factors, and the layer that it changes."""
    found = {}
    for name, tensor in state.items():
        base = f"base_model.model.{name.rpartition('.')[0]}"
        if whole:
            found[f"{base}.base_layer.{name.rpartition('.')[2]}"] = tensor
        if name.endswith("weight"):
            middle = ".default" if whole else ""
            found[f"{base}.lora_A{middle}.weight"] = torch.zeros(2, 3)
            found[f"{base}.lora_B{middle}.weight"] = torch.zeros(4, 2)
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_to_be_merged(whole, tmp_path):
    file = file_of(peft_of(net().state_dict(), whole), tmp_path)
    assert "merge_and_unload" in refused(net(), file)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_weight_that_torch_computes_from_parts_is_to_be_saved_whole(make, tmp_path):
    from torch.nn.utils import parametrizations, parametrize

    given = net(make)
    parametrizations.weight_norm(given[1])
    file = file_of(given.state_dict(), tmp_path)
    assert "parametrize.remove_parametrizations" in refused(net(make), file)
    parametrize.remove_parametrizations(given[1], "weight")
    file = file_of(given.state_dict(), tmp_path)
    layouts.load_into(net(make), checkpoint.read(file), file)


def test_numbers_that_were_quantized_are_to_be_given_as_floats(tmp_path):
    state = net().state_dict()
    state["1.weight"] = state["1.weight"].to(torch.int8)
    file = file_of({**state, "1.SCB": torch.ones(4)}, tmp_path)
    assert "give the float weights" in refused(net(), file)


def test_a_models_own_names_are_no_parts(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Module()
            self.scale.r = nn.Parameter(torch.zeros(2))
            self.other = nn.Linear(2, 2)

    state = Own().state_dict()
    del state["other.bias"]
    line = refused(Own(), file_of(state, tmp_path))
    assert line == "check that model and weights belong together"


# --- names and shapes


@pytest.mark.parametrize("prefix", ["clip", "net.clip", "a.b.c", "student.model"])
def test_the_prefix_that_is_named_is_the_one_to_give(prefix, tmp_path):
    file = file_of({f"{prefix}.{k}": v for k, v in net().state_dict().items()}, tmp_path)
    line = refused(net(), file)
    chosen = line.rpartition(", ")[2]
    assert chosen == f"{file}:{prefix}"
    layouts.load_into(net(), checkpoint.read(chosen), chosen)


def test_of_several_prefixes_all_are_named(tmp_path):
    both = {}
    for prefix in ("student", "teacher"):
        both.update({f"{prefix}.{k}": v + len(prefix) for k, v in net().state_dict().items()})
    line = refused(net(), file_of(both, tmp_path))
    assert "'student.'" in line and "'teacher.'" in line


def test_a_prefix_that_leads_nowhere_is_named_and_not_advised(tmp_path):
    line = refused(net(), file_of({"other.thing": torch.zeros(2)}, tmp_path))
    assert "'other.'" in line and "file" not in line


@pytest.mark.parametrize("more", [1, 2, 500])
def test_a_grown_vocabulary_is_named_with_both_sizes(more, tmp_path):
    model = C.model_of(NAME)
    state = model.state_dict()
    table = state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.cat([table, torch.zeros(more, table.shape[1])])
    line = refused(model, file_of(state, tmp_path))
    assert f"{len(table) + more} tokens, the model has {len(table)}" in line


def test_another_shape_is_named_with_both_sizes(tmp_path):
    state = net().state_dict()
    state["1.weight"] = torch.zeros(5, 3)
    assert "1.weight: 5 x 3 and 4 x 3 in the model" in refused(net(), file_of(state, tmp_path))


# --- one of the two towers


def towers(folder):
    """Yield (what wrote it, an image tower's file, the reference model, the name of its shape)."""
    model = C.model_of(NAME)
    state = model.state_dict()
    visual = {k: v for k, v in state.items() if k.startswith("visual.")}
    yield "open_clip's names", L.plain(visual, folder / "a"), model, NAME
    yield "the tower's own", L.plain(model.visual.state_dict(), folder / "b"), model, NAME
    image = {k: v for k, v in L.tinyclips(state).items() if k.startswith("_image_encoder.")}
    yield "TinyCLIP", L.plain(image, folder / "c"), model, NAME
    clip = L.transformers_clip(C.CLIPS[NAME])
    hf = {k: v for k, v in clip.state_dict().items() if k.startswith(("vision_", "visual_"))}
    yield "transformers' CLIP", L.plain(hf, folder / "d"), L.Transformers(clip, 224, 77), NAME
    siglip = L.transformers_siglip()
    hf = {k: v for k, v in siglip.state_dict().items() if k.startswith("vision_")}
    theirs = L.Transformers(siglip, 224, 64)
    yield "transformers' SigLIP", L.plain(hf, folder / "e"), theirs, "SigLIP-B/16"


def test_an_image_tower_alone_gives_the_references_features_where_only_it_is_wanted(tmp_path):
    for made_by, file, theirs, name in towers(tmp_path):
        config = {"model_cfg": C.CLIPS[name], "preprocess_cfg": C.DEFAULT}
        spec = R.OpenClip(model="own", weights=file, config=config)
        ours, _ = weights.open_clip_model(spec, image_only=True)
        x = torch.randn(2, 3, 224, 224)
        with torch.inference_mode():
            expected = nn.functional.normalize(theirs.encode_image(x), dim=-1)
            found = nn.functional.normalize(ours.encode_image(x), dim=-1)
        torch.testing.assert_close(found, expected, atol=C.MOST, rtol=0, msg=made_by)
        with pytest.raises(EdgeclipError, match=r"one tower alone.*--image-only"):
            weights.open_clip_model(spec)


def test_the_whole_of_a_model_is_read_whole_where_only_its_image_tower_is_wanted(tmp_path):
    model = C.model_of(NAME)
    config = {"model_cfg": C.CLIPS[NAME], "preprocess_cfg": C.DEFAULT}
    spec = R.OpenClip(model="own", weights=L.plain(model.state_dict(), tmp_path), config=config)
    assert C.difference(weights.open_clip_model(spec, image_only=True)[0], model) == 0


def test_a_text_tower_or_half_an_image_tower_is_no_image_tower(tmp_path):
    model = C.model_of(NAME)
    config = {"model_cfg": C.CLIPS[NAME], "preprocess_cfg": C.DEFAULT}
    visual = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    text = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    for state, says in ((text, "one tower alone"), ({**visual, "visual.proj": None}, "1 missing")):
        held = {k: v for k, v in state.items() if v is not None}
        spec = R.OpenClip(model="own", weights=L.plain(held, tmp_path), config=config)
        with pytest.raises(EdgeclipError, match=says):
            weights.open_clip_model(spec, image_only=True)


# --- files of other programs


def npz(path):
    np.savez(path, **{"0.weight": np.zeros((4, 3), np.float32)})


def packed(path):
    torch.save(net().state_dict(), path.with_suffix(".inner"))
    with tarfile.open(path, "w") as tar:
        tar.add(path.with_suffix(".inner"), "weights.pt")


def zipped(path):
    torch.save(net().state_dict(), path.with_suffix(".inner"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".inner"), "weights.pt")


def gzipped(path):
    path.write_bytes(gzip.compress(b"x" * 99))


def graph(path):
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), path)


FOREIGN = {
    "w.npz": (npz, "a file of NumPy arrays"),
    "w.tar": (packed, "a packed archive"),
    "w.zip": (zipped, "a packed archive"),
    "w.pt.gz": (gzipped, "a packed archive"),
    "w.onnx": (graph, "a graph for inference"),
    "w.pt": (lambda path: path.write_text("\n<!DOCTYPE html><html></html>"), "a web page"),
    "w.safetensors": (lambda path: path.write_text("<html>no</html>"), "a web page"),
    "w.bin": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(99)), "a GGUF file"),
    "w.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "w.msgpack": (lambda path: path.write_bytes(b"\x82\xa6params" + bytes(99)), "Flax's"),
    "config.json": (lambda path: path.write_text('{"a": 1}'), "JSON text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_is_called_what_it_is(name, tmp_path):
    write, what = FOREIGN[name]
    write(tmp_path / name)
    with pytest.raises(EdgeclipError) as error:
        checkpoint.read(str(tmp_path / name))
    line = str(error.value)
    assert what in line and "no weights for torch; " in line and "\n" not in line


@pytest.mark.parametrize("content", [b"nothing of the kind", bytes(300), b"\x80\x04."])
def test_what_nobody_knows_is_said_without_torchs_essay(content, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(EdgeclipError) as error:
        checkpoint.read(str(tmp_path / "w.pt"))
    assert "PyTorch 2" not in str(error.value) and "not a readable weights" in str(error.value)

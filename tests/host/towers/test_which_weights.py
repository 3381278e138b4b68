"""Which of the weights in a file are meant is named where there is a choice, and never guessed."""

import pytest
import torch
from safetensors.torch import save_file

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.towers import checkpoint, weights
from tests.support.checkpoints import CNN
from tests.support.command import mistake

A = {"x.weight": torch.zeros(2, 2), "x.bias": torch.zeros(2)}
B = {"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}


def saved(content, tmp_path, name="checkpoint.pt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


def same(found, expected):
    return found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)


TWO = {
    "timm's average": ({"state_dict": A, "state_dict_ema": B}, "state_dict", "state_dict_ema"),
    "timm's other": ({"model": A, "model_ema": B, "epoch": 1}, "model", "model_ema"),
    "deeper": ({"run": {"student": A, "teacher": B}}, "run.student", "run.teacher"),
    "beside tensors": ({**A, "ema": B}, ".", "ema"),
    "data parallel": ({"net": {f"module.{k}": v for k, v in A.items()}, "ema": B}, "net", "ema"),
}


@pytest.mark.parametrize("name", TWO)
def test_two_sets_of_weights_are_a_choice_and_each_can_be_named(name, tmp_path):
    content, first, second = TWO[name]
    file = saved(content, tmp_path)
    with pytest.raises(EdgeclipError) as refused:
        checkpoint.read(file)
    line = str(refused.value)
    assert "\n" not in line and first in line and second in line and f"{file}:" in line
    assert same(checkpoint.read(f"{file}:{first}"), A)
    assert same(checkpoint.read(f"{file}:{second}"), B)


def test_weights_that_are_stored_twice_are_no_choice(tmp_path):
    twice = {"state_dict": A, "model": {k: v.clone() for k, v in A.items()}}
    assert same(checkpoint.read(saved(twice, tmp_path)), A)


def test_an_average_without_names_is_seen_and_cannot_be_taken(tmp_path):
    file = saved({"state_dict": A, "ema": {"shadow_params": list(B.values())}}, tmp_path)
    with pytest.raises(EdgeclipError, match=r"ema\.shadow_params"):
        checkpoint.read(file)
    with pytest.raises(EdgeclipError, match="2 tensors without names"):
        checkpoint.read(f"{file}:ema.shadow_params")
    assert same(checkpoint.read(f"{file}:state_dict"), A)


def test_an_optimizer_is_no_set_of_weights(tmp_path):
    moments = {"state": {"x.weight": {"exp_avg": torch.ones(2, 2)}}, "param_groups": []}
    content = {"state_dict": A, "optimizer": moments, "lr_scheduler": {"base": torch.ones(2)}}
    assert same(checkpoint.read(saved(content, tmp_path)), A)


def test_a_prefix_is_a_key_too(tmp_path):
    path = tmp_path / "both.safetensors"
    state = {f"student.net.{k}": v for k, v in A.items()}
    save_file({**state, **{f"teacher.net.{k}": v for k, v in B.items()}}, path)
    assert same(checkpoint.read(f"{path}:student.net"), A)
    assert same(checkpoint.read(f"{path}:teacher.net"), B)


def test_an_unknown_key_is_told_what_there_is(tmp_path):
    file = saved({"state_dict": A, "state_dict_ema": B}, tmp_path)
    with pytest.raises(EdgeclipError, match=r"has no weights 'ema', but state_dict .2 tensors"):
        checkpoint.read(f"{file}:ema")


@pytest.mark.parametrize("name", ["a:b.pt", "a:b/c:d.pt", "state_dict:x/y.pt", "a.pt:state_dict"])
def test_a_path_may_have_colons_of_its_own(name, tmp_path):
    file = saved({"state_dict": A, "state_dict_ema": B}, tmp_path, name)
    assert same(checkpoint.read(f"{file}:state_dict_ema"), B)
    assert same(checkpoint.read(saved(A, tmp_path / "more", name)), A)


def test_a_fingerprint_knows_which_weights_were_taken(tmp_path):
    file = saved({"state_dict": A, "state_dict_ema": B}, tmp_path)
    sources = {weights.source(f"{file}:{key}") for key in ("state_dict", "state_dict_ema")}
    assert len(sources) == 2 and all(s.startswith("sha256:") for s in sources)


def test_the_named_average_is_what_a_model_gets(tmp_path):
    import timm

    torch.manual_seed(3)
    average = timm.create_model(CNN, num_classes=7).eval()
    zeros = {k: torch.zeros_like(v) for k, v in average.state_dict().items()}
    file = saved({"state_dict": zeros, "state_dict_ema": average.state_dict()}, tmp_path)
    spec = R.Timm(model=CNN, weights=f"{file}:state_dict_ema", image_size=64)
    ours, _ = weights.timm_model(spec, num_classes=None)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), average(x), atol=0, rtol=0)


def test_the_command_line_asks_which(tmp_path):
    file = saved({"state_dict": A, "state_dict_ema": B}, tmp_path)
    call = ("export", "--model", CNN, "--weights", file, "--target", "onnx-fp32")
    mistake(*call, "--out", tmp_path / "out", says="say which one")
    assert not (tmp_path / "out").exists()

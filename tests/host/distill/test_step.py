"""A batch in parts, in half precision or with blocks computed twice is the same step."""

import numpy as np
import pytest
import torch

from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.distill import losses as L
from edgeclip.host.distill.checkpoint import optimizer_tensors, restore_optimizer
from edgeclip.host.distill.optimizer import build_optimizer
from edgeclip.host.distill.pixels import to_input
from edgeclip.host.student import EduAttentionHead, Student, build, checkpoint_gradients
from tests.support.toy_training import run

EVERYTHING = {name: {} for name in L.LOSSES if name != "masked_feature"} | {
    "if_align": {"momentum": 0.5},
    "edu_attention": {"axis": "batch", "keep": False},
}
COMKD = {"kl": {}, "if_align": {"weight": 10}, "edu_attention": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def close(a, b, tolerance=1e-5):
    (steps, weights, log), (other_steps, other_weights, other_log) = a, b
    np.testing.assert_allclose(steps, other_steps, rtol=tolerance)
    for name in weights:
        torch.testing.assert_close(
            weights[name],
            other_weights[name],
            rtol=100 * tolerance,
            atol=100 * tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert [r.keys() for r in log] == [r.keys() for r in other_log]


@pytest.mark.parametrize("loss", [n for n in L.LOSSES if n != "masked_feature"])
def test_a_batch_in_parts_is_the_large_batch_for_every_loss(folder, loss):
    close(run(folder, {loss: {}}, accumulate=4), run(folder, {loss: {}}))


def test_a_batch_in_parts_with_a_text_tower_and_every_loss_at_once(folder):
    close(run(folder, EVERYTHING, text=True, accumulate=3), run(folder, EVERYTHING, text=True))


def test_parts_draw_dropout_once_and_go_on_where_the_second_pass_began(folder):
    a, b = (run(folder, COMKD, kind="dropout", accumulate=n) for n in (2, 2))
    assert a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    close(
        a, run(folder, COMKD, kind="dropout"), tolerance=2e-5
    )  # one generator: two halves draw what the whole draws


def test_masks_are_drawn_once_too(folder):
    masked = {"masked_feature": {"patch": 4, "hidden": 0.5}}
    close(run(folder, masked, accumulate=2), run(folder, masked))


def test_batch_norms_count_a_batch_in_parts_once(folder):
    tracked = "student.tower.1.num_batches_tracked"
    parts, whole = (
        run(folder, COMKD, kind="batch norm", accumulate=2),
        run(folder, COMKD, kind="batch norm"),
    )
    assert parts[1][tracked] == 2 * whole[1][tracked] == 2 * 2 * 2  # two parts a step, each once


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_checkpointing_changes_nothing(folder, accumulate):
    plain = run(folder, COMKD, kind="vit", accumulate=accumulate)
    again = run(folder, COMKD, kind="vit", accumulate=accumulate, gradient_checkpointing=True)
    assert plain[0] == again[0] and all(torch.equal(plain[1][k], again[1][k]) for k in plain[1])


def test_gradient_checkpointing_saves_what_the_blocks_keep():
    student, _ = build(
        R.Student(tower=R.Timm(model="vit_tiny_patch16_224", weights="random", image_size=32)), 8
    )

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            student.train()(torch.zeros(2, 3, 32, 32))
        return sum(sizes)

    before = kept()
    checkpoint_gradients(student.tower)
    assert kept() < before / 4


@pytest.mark.parametrize(
    "student", [{"visual_prompts": {"length": 2, "depth": 2}}, {"share": {"blocks": 1, "times": 2}}]
)
def test_gradient_checkpointing_is_refused_where_it_would_do_nothing(student):
    import msgspec

    spec = msgspec.convert(
        {
            "tower": {
                "kind": "timm",
                "model": "vit_tiny_patch16_224",
                "weights": "random",
                "image_size": 32,
            },
            **student,
        },
        R.Student,
    )
    with pytest.raises(EdgeclipError, match=r"train\.gradient_checkpointing"):
        checkpoint_gradients(build(spec, 8)[0].tower)


@pytest.mark.parametrize(("precision", "steps"), [("bf16", 8), ("fp16", 5)])
def test_half_precision_stays_near_and_keeps_the_weights_whole(folder, precision, steps):
    """fp16 starts with a loss scale so large that its first steps overflow and are left out: then
    it lags behind.
    """
    half, single = run(folder, COMKD, precision=precision), run(folder, COMKD)
    np.testing.assert_allclose(half[0][:steps], single[0][:steps], rtol=0.01)
    assert half[0] != single[0] and {v.dtype for k, v in half[1].items() if "tracked" not in k} == {
        torch.float32
    }


def test_half_precision_in_parts_is_half_precision(folder):
    close(
        run(folder, COMKD, precision="bf16", accumulate=2),
        run(folder, COMKD, precision="bf16"),
        tolerance=1e-3,
    )


def test_a_gradient_that_overflows_fp16_is_left_out_and_the_scale_falls(folder):
    huge = run(folder, {"feature": {"weight": 1e5}}, precision="fp16", warmup_steps=0)
    assert np.isfinite(huge[0]).all() and all(v.isfinite().all() for v in huge[1].values())


def test_weight_decay_can_leave_scalars_and_biases_alone(folder):
    decayed = {"weight_decay": 100.0, "lr": 1e-4, "epochs": 1, "warmup_steps": 0}
    everything, matrices = (
        run(folder, COMKD, weight_decay_of=of, **decayed)[1] for of in ("all", "matrices")
    )
    start = run(folder, COMKD, lr=0, epochs=1, warmup_steps=0)[1]
    for name, before in start.items():
        if name in ("student.tower.1.weight", "student.tower.1.bias"):
            shrunk = [
                (w[name].norm() / before.norm()).item() < 0.99 for w in (everything, matrices)
            ]
            assert shrunk == ([True, True] if before.ndim > 1 else [True, False])


@pytest.mark.parametrize(("of", "least"), [("all", 1), ("matrices", 2)])
@pytest.mark.parametrize("frozen", [True, False])
def test_scalars_never_decay(of, least, frozen):
    student = Student(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), 4, 8, 6)
    head = EduAttentionHead(8, R.EduAttention(learn_temperature=True))
    learned = L.learned_parameters(
        R.Losses(contrastive=R.Weighted(), interactive=R.Weighted()), 8, 0
    )
    modules, train = (
        [student.projector, head, learned],
        R.Train(weight_decay=0.1, weight_decay_of=of),
    )
    asked = R.Recipe(
        data=R.OpenMoji(),
        teacher=R.Conse(),
        losses=R.Losses(kl=R.KL()),
        student=R.Student(tower=R.Timm(model="none", weights="random", image_size=8)),
        train=train,
    )
    groups = build_optimizer(frozen, asked, student, None, modules).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay.keys() == {
        id(p) for m in [*modules, *([] if frozen else [student.tower])] for p in m.parameters()
    }
    assert {decay[id(p)] for p in (head.alpha, head.log_temperature, *learned.values())} == {0.0}
    assert all(
        decay[id(p)] == (0.1 if p.ndim >= least else 0.0) for m in modules for p in m.parameters()
    )


def test_the_optimizers_state_of_other_weights_is_refused():
    one, other = (torch.optim.AdamW([torch.nn.Parameter(torch.ones(shape))]) for shape in ((), 3))
    one.param_groups[0]["params"][0].grad = torch.ones(())
    one.step()
    with pytest.raises(EdgeclipError, match=r"belongs to another weight .*--fresh"):
        restore_optimizer(other, optimizer_tensors(one))


def test_pixels_go_in_as_preprocess_normalizes_them_bit_for_bit():
    spec = Preprocess(
        size=16, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    )
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = to_input(pixels, spec, torch.device("cpu"))
    assert (x.numpy() == normalize(pixels, spec)).all() and x.is_contiguous(
        memory_format=torch.channels_last
    )

"""A folded model computes what the model computed, with fewer layers."""

import pytest
import torch
from torch import nn

from edgeclip.errors import WrongGraph
from edgeclip.host.towers.fold import fold


def randomise(module, seed=0):
    """Batch norms as after training: no statistic is the initial one."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(m.bias, 0, 0.1, generator=generator)
    return module.eval()


def batch_norms(module):
    return [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def equal(module, x, folded=None):
    folded = folded or fold(module, x)
    with torch.inference_mode():
        y = module(x)
        torch.testing.assert_close(folded(x), y, atol=1e-4 * float(y.abs().max()), rtol=0)
    return folded


def image(size=16, n=2, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_after_a_convolution_is_gone(groups, bias):
    torch.manual_seed(0)
    module = randomise(
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups, bias=bias), nn.BatchNorm2d(6), nn.ReLU())
    )
    folded = equal(module, image())
    assert batch_norms(folded) == [] and batch_norms(module) == ["1"]
    equal(module, image(9, 5, 1), folded)  # at another input too


def test_a_batch_norm_after_a_linear_layer_is_gone():
    torch.manual_seed(0)
    module = randomise(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(48, 10, bias=False),
            nn.BatchNorm1d(10),
            nn.ReLU(),
            nn.Linear(10, 4),
        )
    )
    assert batch_norms(equal(module, image(4))) == []


def test_a_batch_norm_before_a_convolution_stays():
    torch.manual_seed(0)
    module = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)))
    assert batch_norms(equal(module, image())) == ["0"]


def test_the_module_itself_is_left_as_it_was(student):
    before = {k: v.clone() for k, v in student.state_dict().items()}
    equal(student, image(32))
    assert all((before[k] == v).all() for k, v in student.state_dict().items()) and batch_norms(
        student
    )


def test_a_students_projector_and_tower_lose_every_batch_norm(student):
    assert batch_norms(equal(student, image(32))) == []


@pytest.mark.parametrize(
    "name", ["repvit_m0_9", "mobileone_s0", "fastvit_t8", "mobilenetv4_conv_small"]
)
def test_a_timm_tower_is_equal_and_without_batch_norm(name):
    import timm

    torch.manual_seed(0)
    module = randomise(timm.create_model(name, pretrained=False, num_classes=0))
    folded = equal(module, image(64))
    left = batch_norms(folded)
    assert left == [], f"{len(left)} of {len(batch_norms(module))} batch norms are left"


class Twice(nn.Module):
    """A convolution that is also read before its batch norm: folding would change the sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_a_fold_that_would_change_the_output_is_refused():
    torch.manual_seed(0)
    with pytest.raises(WrongGraph, match="folding changed the output"):
        fold(randomise(Twice()), image())


@pytest.mark.parametrize("size", [64, 65, 70])
def test_padding_that_depends_on_the_size_is_a_constant_of_the_graph(size):
    import timm

    from edgeclip.host.graph import trace as graph

    torch.manual_seed(0)
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    x = torch.randn(2, 3, size, size)
    model = graph.to_onnx(fold(tower, x), x, "pixels", "image_features", 18)
    assert {n.op_type for n in model.graph.node} == {
        "Conv",
        "Clip",
        "Add",
        "GlobalAveragePool",
        "Flatten",
    }
    assert {i.name for i in model.graph.initializer} <= {
        name for n in model.graph.node for name in n.input
    }

"""Masked images: how much is hidden, and that what hides it is gone afterwards."""

import pytest
import timm
import torch

from edgeclip.host.distill import masking
from edgeclip.host.recipe import MaskedFeature


@pytest.mark.parametrize("hidden", [0.0, 0.25, 0.75])
def test_that_share_of_the_squares_is_hidden_and_the_rest_is_as_it_was(hidden):
    pixels = torch.rand(5, 3, 32, 48) + 1
    seen = masking.hide_squares(pixels, hidden, 8)
    squares = seen.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5)) > 0
    assert squares.flatten(1).sum(dim=1).tolist() == [24 - round(24 * hidden)] * 5
    assert torch.equal(seen[seen != 0], pixels[seen != 0])


def test_a_size_that_is_no_multiple_of_the_square_keeps_its_shape():
    assert masking.hide_squares(torch.ones(1, 3, 30, 21), 0.5, 8).shape == (1, 3, 30, 21)


@pytest.mark.parametrize("hidden", [0.0, 0.75])
def test_a_vit_drops_the_tokens_and_has_its_own_layer_back(hidden):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    pixels, lengths = torch.rand(2, 3, 64, 64), []
    vit.norm_pre.register_forward_hook(
        lambda module, given, tokens: lengths.append(tokens.shape[1])
    )
    own = vit.patch_drop
    masked = masking.forward(vit, pixels, MaskedFeature(hidden=hidden))
    assert lengths == [1 + round(16 * (1 - hidden))] and vit.patch_drop is own
    if hidden == 0.0:  # a ViT does not mind the order of its tokens
        torch.testing.assert_close(masked, vit(pixels), rtol=1e-4, atol=1e-5)


def test_open_clips_vit_drops_them_too():
    import open_clip

    tower = open_clip.model.CLIPVisionCfg(
        image_size=64, layers=1, width=64, head_width=32, patch_size=16
    )
    vit = open_clip.model._build_vision_tower(32, tower).eval()
    pixels = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        masking.forward(vit, pixels, MaskedFeature(hidden=0.0)), vit(pixels), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(masking.forward(vit, pixels, MaskedFeature()), vit(pixels))


def test_a_convolution_sees_the_hidden_image():
    cnn = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    torch.manual_seed(0)
    found = masking.forward(cnn, torch.ones(2, 3, 32, 32), MaskedFeature(patch=8))
    torch.manual_seed(0)
    assert torch.equal(found, cnn(masking.hide_squares(torch.ones(2, 3, 32, 32), 0.75, 8)))

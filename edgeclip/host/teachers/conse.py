"""Assemble a zero-shot dual encoder of an ImageNet classifier and a sentence encoder.

It needs neither a CLIP nor a hub. ConSE (Norouzi et al. 2014): an image's feature is the mean of
the class names' text embeddings, weighted by the classifier's softmax. It knows only what lies
between ImageNet's classes; stage 1 (host/adapt/residual_head.py) gives it the domain. Wherever its
figures are reported it is called what it is: not CLIP.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device import tokenizer
from edgeclip.device.zero_shot import prompts
from edgeclip.host.recipe import Conse, Timm
from edgeclip.host.teachers import Teacher, TextTower, sentence
from edgeclip.host.towers import weights

ANCHORS = "all synonyms, centred"
"""Part of the teacher's identity, whose words are spelled as in 0.1: an identity names the caches
that users have. Change it with the anchors, or an old cache is taken for a new one."""


class ConseTower(nn.Module):
    """Pixels [B, 3, H, W] to rows [B, H + D]: pooled features beside the ConSE embedding."""

    def __init__(self, classifier: nn.Module, anchors: Float[Tensor, "C D"], temperature: float):
        super().__init__()
        self.classifier = classifier
        self.anchors = nn.Buffer(anchors)
        self.temperature = temperature

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B R"]:
        pooled = self.classifier.forward_head(
            self.classifier.forward_features(pixels), pre_logits=True
        )
        probability = F.softmax(self.classifier.get_classifier()(pooled) / self.temperature, dim=-1)
        return torch.cat([pooled, probability @ self.anchors], dim=-1)


class Centered(nn.Module):
    """input_ids [N, L] to unit features [N, D] of an encoder, less `center`."""

    def __init__(self, encoder: nn.Module, center: Float[Tensor, "D"]):
        super().__init__()
        self.encoder = encoder
        self.center = nn.Buffer(center)

    def forward(self, input_ids: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        return F.normalize(self.encoder(input_ids) - self.center, dim=-1)


def load(spec: Conse) -> Teacher:
    classifier, preprocess = weights.timm_model(
        Timm(
            model=spec.classifier,
            weights=spec.weights,
            image_size=spec.image_size,
            crop_pct=spec.crop_pct,
        ),
        num_classes=None,
    )
    encoder, words = sentence.load(weights.pip_file(spec.text.removeprefix("pip:")))
    anchors = _anchors(spec, encoder, words)
    center = anchors.mean(dim=0)
    text = _text_tower(spec, encoder, words, center)
    return Teacher(
        name=f"{spec.classifier} + MiniLM joined by ConSE (not CLIP)",
        license="EfficientNet-Lite and all-MiniLM-L6-v2: Apache-2.0",
        identity={
            "kind": "conse",
            "classifier": spec.classifier,
            "weights": weights.source(spec.weights),
            "text": weights.source(spec.text),
            "anchors": ANCHORS,
            "anchor_prompt": spec.anchor_prompt,
            "temperature": spec.temperature,
            "centre_texts": spec.center_texts,
        },
        preprocess=preprocess,
        logit_scale=spec.logit_scale,
        embed_dim=sentence.WIDTH,
        tower=ConseTower(classifier, anchors - center, spec.temperature)
        .eval()
        .to(memory_format=torch.channels_last),
        features=lambda rows: rows[:, -sentence.WIDTH :],
        encode_text=lambda texts: _encode(text.module, words, texts),
        text=text,
    )


def load_text(spec: Conse) -> TextTower:
    encoder, words = sentence.load(weights.pip_file(spec.text.removeprefix("pip:")))
    center = _anchors(spec, encoder, words).mean(dim=0) if spec.center_texts else None
    return _text_tower(spec, encoder, words, center)


def _text_tower(
    spec: Conse, encoder: nn.Module, words: str, center: Float[Tensor, "D"] | None
) -> TextTower:
    module = Centered(encoder, center) if spec.center_texts and center is not None else encoder
    return TextTower(module=module.eval(), tokenizer=words, context_length=sentence.CONTEXT_LENGTH)


def _anchors(spec: Conse, encoder: nn.Module, words: str) -> Float[Tensor, "C D"]:
    from timm.data import ImageNetInfo

    # every synonym of a class: "jersey" alone hides the T-shirt (on clothing novel .39 against .75)
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    return _encode(encoder, words, prompts(names, [spec.anchor_prompt])).clone()


@torch.inference_mode()
def _encode(module: nn.Module, words: str, texts: list[str]) -> Float[Tensor, "N D"]:
    loaded = tokenizer.load(words, sentence.CONTEXT_LENGTH)
    ids = torch.from_numpy(tokenizer.encode(loaded, texts))
    ids = ids[:, : int((ids != 0).sum(dim=1).max())].to(
        next(module.parameters()).device
    )  # padding to the longest is enough
    return torch.cat([module(part) for part in ids.split(256)]).cpu()

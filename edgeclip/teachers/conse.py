"""An assembled teacher: ImageNet classifier + sentence encoder = zero-shot dual encoder, without a CLIP and a hub.

ConSE (Norouzi et al. 2014): an image's feature is the mean of the class names' text embeddings, weighted by the
classifier's softmax. It knows only what lies between ImageNet's classes; stage 1 (`distill/adapt.py`) gives it the
domain. Wherever its figures are reported it is called what it is: not CLIP.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import tokenizer, weights
from edgeclip.recipe import Conse, Timm
from edgeclip.teachers import Teacher, TextTower, sentence

ANCHORS = "all synonyms, no prompt, centred"
"""Part of the teacher's identity: change it with the anchors, or an old cache is taken for a new one."""


class ConseTower(nn.Module):
    """Pixels [B, 3, H, W] to rows [B, H + D]: pooled features beside the ConSE embedding."""

    def __init__(self, classifier: nn.Module, anchors: Float[Tensor, "C D"]):
        super().__init__()
        self.classifier = classifier
        self.anchors = nn.Buffer(anchors)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B R"]:
        pooled = self.classifier.forward_head(self.classifier.forward_features(pixels), pre_logits=True)
        probability = F.softmax(self.classifier.get_classifier()(pooled), dim=-1)
        return torch.cat([pooled, probability @ self.anchors], dim=-1)


def load(spec: Conse) -> Teacher:
    from timm.data import ImageNetInfo

    classifier, preprocess = weights.timm_model(Timm(model=spec.classifier, weights=spec.weights, image_size=spec.image_size), num_classes=None)
    text = load_text(spec)
    words = tokenizer.load(text.tokenizer, text.context_length)

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Float[Tensor, "N 384"]:
        ids = torch.from_numpy(tokenizer.encode(words, texts, text.context_length))
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]  # padding to the longest is enough
        return torch.cat([text.module(part) for part in ids.split(256)])

    # every synonym of a class, and no prompt: "jersey" alone hides the T-shirt (on clothing novel .39 against .75)
    anchors = encode_text([str(names) for names in ImageNetInfo("imagenet-1k").label_descriptions()]).clone()
    return Teacher(
        name=f"{spec.classifier} + MiniLM joined by ConSE (not CLIP)",
        licence="EfficientNet-Lite and all-MiniLM-L6-v2: Apache-2.0",
        identity={
            "kind": "conse",
            "classifier": spec.classifier,
            "weights": weights.source(spec.weights),
            "text": weights.source(spec.text),
            "anchors": ANCHORS,
        },
        preprocess=preprocess,
        logit_scale=spec.logit_scale,
        embed_dim=sentence.WIDTH,
        tower=ConseTower(classifier, anchors - anchors.mean(dim=0)).eval().to(memory_format=torch.channels_last),
        features=lambda rows: rows[:, -sentence.WIDTH :],
        encode_text=encode_text,
        text=text,
    )


def load_text(spec: Conse) -> TextTower:
    encoder, tokenizer_json = sentence.load(weights.pip_file(spec.text.removeprefix("pip:")))
    return TextTower(module=encoder, tokenizer=tokenizer_json, context_length=sentence.CONTEXT_LENGTH)

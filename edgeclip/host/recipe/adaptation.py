"""How a teacher learns the domain before it is distilled: a residual head, prompts, or a map."""

from typing import Annotated

from msgspec import Meta

from edgeclip.config import BrokenRule, Config
from edgeclip.host.recipe.ingredients import Fraction, NonNegative, Positive, PositiveFloat


class SelfTraining(Config):
    """Of stage 1: images without labels learn from the head's own answers, balanced over the
    classes that are trained on.

    What is scored on those classes afterwards is transductive, for the teacher too.
    """

    weight: NonNegative = 1.0
    """of the cross-entropy to the pseudo-labels"""
    start: Positive = 100
    """first step; until then there are labels only"""
    every: Positive = 20
    """steps between two looks at all images"""


class ResidualHead(Config, tag="residual_head", tag_field="kind"):
    """ComKD stage 1 for the assembled teacher: a residual head on its image rows, on labeled
    classes."""

    hidden: Positive = 512
    dropout: Fraction = 0.0
    steps: Positive = 300
    batch_size: Positive = 256
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 1e-2
    toward_unadapted: NonNegative = 1.0
    """weight of 1 - cosine to the unadapted features, which keeps classes without labels from
    suffering"""
    margin: NonNegative | None = None
    """logit adjustment (arXiv 2007.07314): classes without labels compete for the labeled images
    too, those with labels set forward by so much of a logit; null: only classes with labels do"""
    self_training: SelfTraining | None = None
    """null: labeled images only"""

    def __post_init__(self) -> None:
        if self.self_training and self.self_training.start >= self.steps:
            raise BrokenRule(
                "self_training.start",
                f"is beyond the {self.steps} steps of stage 1",
                "start earlier, or set it to null",
            )


class Fuse(Config):
    """Several teachers made one by a linear map of their features side by side (MST-KD)."""

    steps: Positive = 300
    batch_size: Positive = 256
    lr: NonNegative = 1e-3
    labels: NonNegative = 1.0
    """weight of the cross-entropy with the labels that there are, beside the KL to the average of
    the teachers' distributions"""


class Prompts(Config, tag="prompts", tag_field="kind"):
    """ComKD stage 1 for an open_clip ViT teacher: PromptSRC's prompts in both encoders
    (docs/design/methods.md#33-stage-1-by-prompts), on labeled classes. The towers stay frozen. The
    defaults are PromptKD's configuration of its ViT-L/14 teacher; momentum and weight decay are not
    published with it, they are the usual ones."""

    length: Positive = 4
    """prompt tokens at each prompted block, in each encoder"""
    depth: Positive = 9
    """prompted blocks, from the first on, in each encoder"""
    text_init: str = "a photo of a"
    """whose token embeddings the text prompts of the first block start from; all other prompts
    start random"""
    shots: Positive | None = None
    """labeled images a class, drawn by the recipe's seed; null: all of them"""
    epochs: Positive = 20
    warmup_epochs: Annotated[int, Meta(ge=0)] = 1
    """at warmup_lr throughout; the cosine follows"""
    warmup_lr: NonNegative = 1e-5
    batch_size: Positive = 8
    lr: NonNegative = 0.005
    """SGD's; the cosine steps once an epoch"""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    image_weight: NonNegative = 10.0
    """of the L1 distance (mean over D) between prompted and frozen unit image features"""
    text_weight: NonNegative = 25.0
    """of the same between prompted class features and the frozen template ensemble"""
    logit_weight: NonNegative = 1.0
    """of KL(frozen || prompted) over the labeled classes, divided by images and classes"""
    average_mean: float = 15.0
    """the prompts that are kept average those after each epoch, with Gaussian weights around this
    epoch (from 1)"""
    average_std: PositiveFloat = 1.0
    """epochs"""


Adapt = ResidualHead | Prompts


# --- views, student

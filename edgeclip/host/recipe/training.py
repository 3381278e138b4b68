"""How a student is trained and measured: losses, schedule, parity images, a short benchmark."""

from typing import Annotated, Literal

from msgspec import Meta

from edgeclip.config import BrokenRule, Config
from edgeclip.host.recipe.ingredients import Fraction, NonNegative, Positive, PositiveFloat


class KL(Config):
    """Equation 8: KL(softmax(q_t / tau) || softmax(q_s / tau)) over the class list of the training
    images."""

    weight: NonNegative = 1.0
    temperature: PositiveFloat = 1.0
    reduction: Literal["batchmean", "promptkd"] = "batchmean"
    """A12. promptkd divides by B * N, not B, so weights of 200 to 1000 are its usual ones"""
    offset: bool = False
    """set the classes with labels back in the target, as `calibration` does where a teacher
    answers: then the student's features learn it, and its own offset is what is left"""


class IFAlign(Config):
    """Equations 3 to 5: L1 between the means and variances of student's and teacher's features."""

    weight: NonNegative = 10.0
    """lambda, beside a KL of 1"""
    axis: Literal["batch", "tokens", "channels"] = "batch"
    """A1: over the batch, a channel each; over the channels, an image each; tokens are not in a
    cache, so that reading is refused"""
    normalize: bool = True
    """A2: of unit features; false: of the features before their norm is divided out, on both
    sides"""
    reduction: Literal["mean", "sum"] = "mean"
    """A3: of the L1 norm over the channels; sum is D times mean"""
    spread: Literal["variance", "deviation"] = "variance"
    """equation 4, or its square root: unit features have variances of about 1 / D, so that beside
    the means' half the variances' hardly weighs"""
    scale: Literal["none", "teacher"] = "none"
    """teacher: each half over the mean magnitude of the teacher's own statistic, so that both are
    relative errors; weights of about 1 are its usual ones"""
    features: Literal["image", "head"] = "image"
    """A9: P(u_s), or what EduAttention made of it"""
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """A13: of a moving average of the statistics over batches, for small batches; 0: this batch's
    alone. The gradient is that of this batch's share, 1 - momentum, so the weight counts for that
    much less"""

    def __post_init__(self) -> None:
        if self.axis == "tokens":
            raise BrokenRule(
                "axis",
                "tokens needs token features, which a teacher cache does not hold",
                "use axis: batch",
            )
        if self.axis == "channels" and self.momentum:
            raise BrokenRule(
                "momentum", "channels have no statistics that outlive a batch", "use axis: batch"
            )
        if self.features == "head" and not self.normalize:
            raise BrokenRule(
                "normalize",
                "false needs a raw form, which EduAttention's output does not have",
                "use normalize: true, or features: image",
            )


class EduAttention(Config):
    """Equations 6 and 7: attention of the student's feature over the class matrix, alpha learnable
    from 0."""

    temperature: PositiveFloat = 0.1
    """A6: C; with `query: raw` sqrt(D) is its usual value"""
    learn_temperature: bool = False
    query: Literal["unit", "raw"] = "unit"
    """A6: the query is P(u_s) as a unit row, or before its norm is divided out"""
    fc: Literal["query", "key_value", "output", "none"] = "query"
    """A4, A5: where the fully connected layer sits"""
    fc_start: Literal["random", "identity"] = "random"
    """what that layer starts as; as the identity the first attention is the student's own"""
    center: bool = False
    """keys and values are the class features less their mean over the active list: what classes
    share says nothing about which one it is"""
    axis: Literal["classes", "batch"] = "classes"
    """A7: of the softmax"""
    residual: Literal["student", "teacher"] = "student"
    """A8: what equation 7 adds to in training; at inference it is the student's, for there is no
    other"""
    normalize: bool = True
    """A10: unit rows before the class scores"""
    learn_alpha: bool = True
    """false: alpha stays 0, which is PromptKD"""
    keep: bool = True
    """keep it in the bundle's classification head, over the class list that is active there (A11:
    `evaluate` scores both); accuracy is reported with and without it either way"""

    def __post_init__(self) -> None:
        if self.keep and (self.query == "raw" or self.axis == "batch"):
            raise BrokenRule(
                "keep",
                "a bundle has one image's unit feature, and this reading needs more than that",
                "set keep: false",
            )


class Weighted(Config):
    weight: NonNegative = 1.0


class Affinity(Config):
    weight: NonNegative = 1.0
    form: Literal["kl", "cross_entropy"] = "cross_entropy"
    """KL (CLIP-KD's CRD) and soft cross-entropy (TinyCLIP, open_clip) differ by the teacher's
    entropy, a constant"""
    logit_scale: PositiveFloat | None = None
    """of teacher and student alike (TinyCLIP: 50); null: the teacher's own"""


class Distribution(Config):
    weight: NonNegative = 1.0
    logit_scale: PositiveFloat | None = None
    """the student's; null: the first teacher's own"""


class MaskedFeature(Config):
    weight: NonNegative = 1.0
    hidden: Fraction = 0.75
    """share of the patches that the student does not see"""
    patch: Positive = 16
    """pixels a side of a hidden square, for a tower that is no ViT; a ViT's own patches are
    dropped"""


NO_LOSS = ("edu_attention", "captions")
"""fields of `Losses` that are no loss themselves"""


class Losses(Config):
    kl: KL | None = None
    if_align: IFAlign | None = None
    edu_attention: EduAttention | None = None
    cross_entropy: Weighted | None = None
    """hard labels, of the images that have one"""
    prototype: Weighted | None = None
    """CLIP-Embed-KD: class prototypes made of the teacher's features of the labeled images"""
    teacher_match: Weighted | None = None
    """CLIP-Embed-KD's live-teacher counterpart: each image finds its own teacher feature in the
    batch"""
    contrastive: Weighted | None = None
    """InfoNCE"""
    affinity: Affinity | None = None
    """teacher's against student's image-text similarities"""
    distribution: Distribution | None = None
    """MobileCLIP: the average of several teachers' image-text similarities"""
    feature: Weighted | None = None
    """1 - cosine to the teacher's features (FD up to its constant)"""
    masked_feature: MaskedFeature | None = None
    """CLIP-KD's MFD"""
    gradient: Weighted | None = None
    """CLIP-KD's GD; its usual weight is 1e8"""
    interactive: Weighted | None = None
    """CLIP-KD's ICL"""
    augmented_feature: Weighted | None = None
    """CLIP-KD's AFD"""
    vrd: Weighted | None = None
    """CLIP-RD: vertical relational distillation"""
    xrd: Weighted | None = None
    """CLIP-RD: cross relational distillation"""
    captions: Literal["data", "classes"] = "data"
    """the text of an image for losses that need one: its own caption; or the prompts of its class,
    of its label where the teacher had it and of the adapted teacher's first choice elsewhere (so no
    label is seen that is not to be seen)"""

    def __post_init__(self) -> None:
        if self.edu_attention and not self.kl:
            raise BrokenRule(
                "edu_attention", "has no loss of its own", "add losses.kl, which trains it"
            )

    def names(self) -> list[str]:
        """Return the losses that the recipe has."""
        blocks = [name for name in self.__struct_fields__ if name not in NO_LOSS]
        return [name for name in blocks if getattr(self, name) is not None]


class Pretrain(Config):
    """First training (Pea-KD): the whole student learns the teacher's plain answers before the full
    loss starts."""

    epochs: Positive = 1
    labels: Literal["features", "predictions"] = "features"
    """features: 1 - cosine to the teacher's image feature; predictions: cross-entropy with the
    teacher's own best class"""


class Train(Config):
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    """steps on frozen tower features first, so that the new projector's noise does not reach the
    tower's weights"""
    warmup_batch_size: Positive = 128
    warmup_lr: NonNegative = 2e-3
    pretrain: Pretrain | None = None
    """after the projector's warm-up, with an optimizer and a learning rate course of its own; null:
    the full loss at once"""
    epochs: Annotated[int, Meta(ge=0)] = 1
    """over all images, one view each, all weights trained"""
    batch_size: Positive = 64
    """images of a step, over all processes and parts"""
    lr: NonNegative = 5e-4
    tower_lr_ratio: NonNegative = 1.0
    """the tower's learning rate (visual prompts included) over the projector's"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """of the epochs; the warm-up steps always take adamw"""
    momentum: Fraction = 0.9
    """of sgd"""
    weight_decay: NonNegative = 1e-2
    weight_decay_of: Literal["all", "matrices"] = "all"
    """matrices: of weights with two or more dimensions only, as CLIP was trained; biases and norms
    keep theirs. Scalars (alpha, log scales) never decay"""
    max_grad_norm: PositiveFloat | None = None
    """a step's gradient over all weights that is longer is shortened to this norm; null: it is
    taken as it is"""
    average_last: Fraction = 0.0
    """share of the steps of the epochs, from the end, whose weights' mean the student becomes
    (stochastic weight averaging, arXiv 1803.05407); 0: the last step's weights"""
    freeze_batch_norm: bool = False
    """keep the pretrained tower's batch-norm statistics (its weights are trained all the same): a
    small set's batches have other statistics than those its filters were learned with"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu; which it was is printed and recorded"""
    threads: Positive = 2
    """that decode images, of each process"""
    accumulate: Positive = 1
    """parts that a process's share of the batch passes the towers in; the losses see the whole
    batch all the same, for the price of one more forward. Batch norms inside the towers see a
    part"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the towers' matrix products (autocast; fp16 with a loss scale); new layers, losses and
    weights stay fp32"""
    gradient_checkpointing: bool = False
    """keep each block's input only and compute the rest again in the backward pass: less memory,
    about a third more time"""
    checkpoint_every: Annotated[int, Meta(ge=0)] = 500
    """steps after which the state is saved, beside the end of each epoch and a signal; 0: only
    those"""
    tensorboard: bool = False
    """write curves to the run's tensorboard folder"""


class Calibration(Config):
    """How far the classes with labels are set back against the others (docs/calibration.md)."""

    labeled_weight: PositiveFloat = 1.0
    """more than 1 keeps more of the labeled classes' answers, less gives more to the others: a
    factor of the labeled classes' odds, or of how far the offset is from the images with a label,
    as against the others"""
    prior: Annotated[float, Meta(gt=0.0, lt=1.0)] | None = None
    """share of the training images that is to name a labeled class; null: the offset is midway
    between the images with a label and those without, and at most so large that as many name a
    labeled class as have a label; or where images without a label may be of labeled classes too,
    each class is named as often as another"""


class Parity(Config):
    """What `validate` compares on: images that the run keeps, with the fp32 student's features of
    them."""

    max_images: Positive = 10_000
    """at most so many of the evaluation images, by a fixed seed"""


class Bench(Config):
    min_duration_s: NonNegative = 60.0
    min_query_count: Positive = 1024


class QAT(Config):
    """What follows stage 2."""

    target: str
    """an int8 target of onnxruntime or tensorrt, by name or path: a copy of the student learns on
    with that target's rounding, and `export` to that target writes the copy with its learned
    scales; the float student stays what it was"""
    epochs: Positive = 1
    lr: NonNegative = 1e-4

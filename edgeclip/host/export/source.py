"""What is exported: a run's student, or any open_clip or timm checkpoint, as one record."""

import collections
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import (
    ImageRef,
    Skipped,
    digest,
    index_folder,
    index_tar,
    load_first,
    say_skipped,
)
from edgeclip.device.manifest import ClassOffset, Parents
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.target import Floor
from edgeclip.device.turned import say_turned
from edgeclip.device.zero_shot import EduAttention, class_scores, ensemble, offsets, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import data, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.cache import CACHE
from edgeclip.host.recipe import OpenClip, OpenMoji, Prompts, Recipe, Timm, of_run
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers import open_clip as open_clip_teacher
from edgeclip.host.towers import published, reference, weights

GOLDEN = 8
"""images that ship with a bundle"""
TEMPLATES = ["a photo of a {c}"]
"""prompts of an open_clip model that is exported without a run"""


class Source(NamedTuple):
    """A dual encoder with everything that a bundle says of it."""

    image_encoder: nn.Module
    """pixels [B, 3, H, W] to unit rows [B, D]"""
    preprocess: Preprocess
    load_text: Callable[[], TextTower] | None
    """None: no text encoder ships"""
    labels: list[str]
    templates: list[str]
    class_features: np.ndarray
    """[N, D], unit rows"""
    head: EduAttention | None
    logit_scale: float
    calibration: Callable[[], list[ImageRef]]
    """training images, with the labels that training may know; called for int8 targets only"""
    evaluation_hashes: Callable[[], set[str]]
    """sha256 of the images that the student is evaluated on and did not see in training"""
    golden: list[ImageRef]
    """images that ship with the bundle as its proof"""
    golden_license: str
    licenses: dict[str, str | None]
    parents: Parents
    vocabulary: list[str] | None = None
    """texts whose tokens, beside those of labels and templates, are all that the text encoder
    keeps; None: it keeps all"""
    quantized: Path | None = None
    """folder of the copy that learned with an int8 target's rounding; None: there is none"""
    class_offset: ClassOffset | None = None
    """what is taken from the scores of classes with labels"""
    transform: reference.Transform | None = None
    """the library's own evaluation transform, which golden answers are made with; None: a student,
    which edgeclip trained on its own"""
    floor: Floor = Floor()
    """what a bundle must reach where its target does not say"""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return the scores [B, N] of unit rows [B, D] over all labels, as the bundle's."""
        set_back = offsets(self.class_offset, self.labels)
        return class_scores(features, self.class_features, self.head, offsets=set_back)


def from_run(run: Path) -> Source:
    """Return the student of a finished run. Raises `EdgeclipError` where it is not finished."""
    disk.read_manifest(run, "run")
    student, head, preprocess, description = students.load(run / "student")
    recipe = of_run(run)
    evaluation = run / "evaluation"
    manifest = disk.read_manifest(evaluation, "evaluation")
    images = index_tar(evaluation / "images.tar")
    say_turned([images], preprocess.exif)

    load_text = None
    if recipe.text_encoder:
        load_text = partial(_text_of_run, run, recipe)
    shipped_head = None
    if head is not None and head.spec.keep:
        shipped_head = head.numpy()
    parents = {"student": disk.sha256(run / "student" / disk.MANIFEST), **description["parents"]}
    quantized = None
    if (run / "quantized" / disk.MANIFEST).exists():
        quantized = run / "quantized"
        parents["quantized"] = disk.sha256(quantized / disk.MANIFEST)

    return Source(
        image_encoder=student,
        preprocess=preprocess,
        load_text=load_text,
        labels=description["labels"],
        templates=description["templates"],
        class_features=disk.read_array(run / "student" / "class_features.npy"),
        head=shipped_head,
        class_offset=students.class_offset(description),
        logit_scale=description["logit_scale"],
        calibration=partial(_training_images, run, recipe),
        evaluation_hashes=partial(_evaluation_hashes, evaluation),
        golden=images[:GOLDEN],
        golden_license=manifest["license"],
        licenses=description["licenses"],
        parents=parents,
        quantized=quantized,
        floor=recipe.floor,
    )


def _text_of_run(run: Path, recipe: Recipe) -> TextTower:
    """Return the student's own text tower, or the one that its class features were made with."""
    own = students.load_text(run / "student")
    if own:
        return own
    if isinstance(recipe.adapt, Prompts):
        # The features were made with the context that stage 1 learned, so words must get it too.
        return promptsrc.load_text(recipe.teacher, recipe.adapt, run / "teacher")
    return teachers.load_text(recipe.teacher)


def _training_images(run: Path, recipe: Recipe) -> list[ImageRef]:
    """Return the run's training images as its cache had them, labeled as in stage 1.

    Raises `EdgeclipError` where the data has been moved.
    """
    spec = recipe.data
    if not isinstance(spec, OpenMoji) and not Path(spec.root).is_dir():
        recipe_file = run / "recipe.yaml"
        raise EdgeclipError(
            spec.root,
            f"there is no such folder for the data '{spec.name}'",
            f"say where it lies: edgeclip distill {recipe_file} --out {run} --data {spec.name}=DIR",
        )
    dataset = data.load(spec, CACHE)
    labeled = {image.key for image in dataset.labeled}
    images = []
    for image in dataset.train:
        if image.key not in labeled:
            image = image._replace(label=-1)
        images.append(image)
    return images


def _evaluation_hashes(evaluation: Path) -> set[str]:
    """sha256 of the held-out images of a run's evaluation."""
    record = disk.read_json(evaluation / "evaluation.json")
    if "held_out" in record:
        return set(record["held_out"])
    # An older run listed no hashes: those of the images that it kept.
    images = index_tar(evaluation / "images.tar")
    hashes: set[str] = set()
    for dataset in record["sets"]:
        if not dataset.get("seen"):
            hashes.update(digest(images[i]) for i in dataset["rows"])
    return hashes


class _Normalized(nn.Module):
    """A tower with unit rows."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.tower(pixels), dim=-1)


def from_model(
    name: str,
    weights_name: str,
    labels: list[str],
    images: Path | None,
    text: bool = True,
    resize_pos_embed: bool = False,
    like: str | None = None,
) -> Source:
    """Return any open_clip model or any timm classifier.

    name: the model's, or a JSON file of an open_clip configuration. images: a folder for
    calibration and golden answers. text: False leaves an open_clip model's text encoder out.
    resize_pos_embed, like: as in a recipe.
    Raises `EdgeclipError` for unknown names, weights that do not fit, or labels that are not the
    classifier's.
    """
    import open_clip
    import timm

    photos: list[ImageRef] = []
    if images:
        skipped: Skipped = collections.Counter()
        photos = index_folder(images, skipped)
        say_skipped(images, len(photos), skipped, "files")
        if not photos:
            raise EdgeclipError(images, "has no images", "give a folder of .jpg, .png or .webp")
    say_turned([photos], exif=False)
    given: dict[str, Any] = {
        "weights": weights_name,
        "like": like,
        "resize_pos_embed": resize_pos_embed,
    }
    if name.endswith(".json"):
        spec = OpenClip(model=Path(name).stem, config=disk.read_json(Path(name)), **given)
    elif name in open_clip.list_models() or published.is_open_clips(name, weights_name):
        spec = OpenClip(model=name, **given)
    elif timm.is_model(name) or name.startswith(published.REPOSITORY):
        spec_of_timm = Timm(model=name, image_size=224, crop_pct=None, **given)
        return _from_timm(spec_of_timm, labels, photos)
    else:
        raise EdgeclipError(
            name,
            "neither an open_clip nor a timm model",
            "see open_clip.list_models() and timm.list_models()",
        )
    if text:
        return _from_open_clip(spec, labels, photos)
    return _image_side(spec, labels, photos)


def _from_open_clip(spec: OpenClip, labels: list[str], images: list[ImageRef]) -> Source:
    """Both encoders of an open_clip model, its labels in one prompt each."""
    teacher = open_clip_teacher.load(spec)
    class_features = np.zeros((0, teacher.embed_dim), np.float32)
    if labels:
        teachers.check_class_names(teacher, labels, tuple(TEMPLATES))
        features = teacher.encode_text(prompts(labels, TEMPLATES)).numpy()
        class_features = ensemble(features[:, None])
    plain = _of_checkpoint(spec, teacher.tower, teacher.preprocess, class_features, labels, images)
    return plain._replace(
        load_text=lambda: teachers.load_text(spec),
        transform=reference.of_open_clip(spec, teacher.preprocess.size),
        templates=TEMPLATES,
        logit_scale=teacher.logit_scale,
    )


def _image_side(spec: OpenClip, labels: list[str], images: list[ImageRef]) -> Source:
    """Return an open_clip model's image encoder alone, for an index or without a tokenizer."""
    if labels:
        raise EdgeclipError(
            "--labels",
            "labels need the text encoder, and --image-only leaves it out",
            "drop --image-only, or the labels",
        )
    model, preprocess = weights.open_clip_model(spec, image_only=True)
    tower = open_clip_teacher.ImageTower(model)
    size = preprocess.size
    with torch.inference_mode():
        width = tower.eval()(torch.zeros(1, 3, size, size)).shape[1]
    class_features = np.zeros((0, width), np.float32)
    plain = _of_checkpoint(spec, tower, preprocess, class_features, labels, images)
    return plain._replace(
        logit_scale=model.logit_scale.exp().item(), transform=reference.of_open_clip(spec, size)
    )


def _from_timm(spec: Timm, labels: list[str], images: list[ImageRef]) -> Source:
    """Return a timm classifier as a dual encoder without a text encoder.

    Its logits are the image feature and the text feature of class i is the i-th unit vector, so the
    ranking by cosine is exactly the ranking by logit.
    """
    encoder, preprocess = weights.timm_model(spec, num_classes=None)
    _, height, width = encoder.pretrained_cfg["input_size"]
    if height != width:
        raise EdgeclipError(
            spec.model, f"takes images of {width} x {height}", "take a model of square ones"
        )
    preprocess = msgspec.structs.replace(preprocess, size=width)
    classes = encoder.num_classes
    class_features = np.zeros((0, classes), np.float32)
    if labels:
        if len(labels) != classes:
            raise EdgeclipError(
                "--labels",
                f"has {len(labels)} labels, {spec.model} has {classes} classes",
                "give the classifier's own labels in its order",
            )
        class_features = np.eye(classes, dtype=np.float32)
    plain = _of_checkpoint(spec, encoder, preprocess, class_features, labels, images)
    return plain._replace(transform=reference.of_timm(spec, encoder))


def _of_checkpoint(
    spec: OpenClip | Timm,
    tower: nn.Module,
    preprocess: Preprocess,
    class_features: np.ndarray,
    labels: list[str],
    images: list[ImageRef],
) -> Source:
    """Return a checkpoint without text encoder, at scale 1: what all of them share.

    Raises `EdgeclipError` where more than 1 % of the images cannot be read, of those that ship.
    """
    readable, _ = load_first(images, range(len(images)), GOLDEN, preprocess)
    return Source(
        image_encoder=_Normalized(tower).eval(),
        preprocess=preprocess,
        load_text=None,
        labels=labels,
        templates=[],
        class_features=class_features,
        head=None,
        logit_scale=1.0,
        calibration=lambda: images,
        evaluation_hashes=set,
        golden=[images[i] for i in readable],
        golden_license="the user's own images",
        licenses={"model": "unknown", "data": "none"},
        parents=_parents(spec, labels, images),
    )


def _parents(spec: OpenClip | Timm, labels: list[str], images: list[ImageRef]) -> Parents:
    """Return what the bundle is made of, by content: a file may be rewritten under its name."""
    hashes = []
    for image in images:
        with contextlib.suppress(UnreadableImage):  # what ships or calibrates is judged there
            hashes.append((image.key, digest(image)))
    told = weights.assumed_of(spec).told
    return {
        **({"assumed": told} if told else {}),
        "model": spec.model,
        "config": disk.fingerprint(getattr(spec, "config", None)),
        "weights": weights.origin(spec),
        "labels": disk.fingerprint(labels),
        "images": disk.fingerprint(hashes),
    }


def with_vocabulary(source: Source, texts: list[str]) -> Source:
    """Return the source with the tokens of labels, templates and `texts` alone.

    Raises `EdgeclipError` where it has no text encoder.
    """
    if not source.load_text:
        raise EdgeclipError(
            "--vocabulary", "there is no text encoder whose tokens it could keep", "leave it out"
        )
    parents = {**source.parents, "vocabulary": disk.fingerprint(texts)}
    return source._replace(vocabulary=texts, parents=parents)

"""What is exported: a run's student, or any open_clip or timm checkpoint, as one record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device.images import ImageRef, digest, index_folder, index_tar
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.zero_shot import EduAttention, ensemble, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import data, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.cache import CACHE
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers import open_clip as open_clip_teacher
from edgeclip.host.towers import weights


class Source(NamedTuple):
    image_encoder: nn.Module
    """pixels [B, 3, H, W] to unit rows [B, D]"""
    preprocess: Preprocess
    load_text: Callable[[], TextTower] | None
    """None: no text side ships"""
    labels: list[str]
    templates: list[str]
    class_features: np.ndarray
    """[N, D], unit rows"""
    head: EduAttention | None
    logit_scale: float
    calibration: Callable[[], list[ImageRef]]
    """training images, with the labels that training may know; asked for by int8 targets only"""
    evaluation_hashes: Callable[[], set[str]]
    """sha256 of the images that the student is evaluated on and did not see in training"""
    golden: list[ImageRef]
    """images that ship with the bundle as its proof"""
    golden_license: str
    licenses: dict[str, str]
    parents: dict[str, Any]
    vocabulary: list[str] | None = None
    """texts whose tokens, beside those of labels and templates, are all that the text encoder keeps; None: it keeps all"""
    quantized: Path | None = None
    """folder of the copy that learned with an int8 target's rounding; None: there is none"""


def from_run(run: Path) -> Source:
    """The student of a finished run. Raises `EdgeclipError` where the run is not finished."""
    disk.read_manifest(run, "run")
    student, head, preprocess, description = students.load(run / "student")
    asked = recipe.of_run(run)

    def training_images() -> list[ImageRef]:
        # As the cache was asked to have them: nothing held out, and no label that stage 1 had not.
        spec = asked.data
        if not isinstance(spec, recipe.OpenMoji) and not Path(spec.root).is_dir():
            moved = f"say where it lies: edgeclip distill {run / 'recipe.yaml'} --out {run} --data {spec.name}=DIR"
            raise EdgeclipError(
                spec.root, f"there is no such folder for the data '{spec.name}'", moved
            )
        dataset = data.load(spec, CACHE)
        labeled = {p.key for p in dataset.labeled}
        return [p if p.key in labeled else p._replace(label=-1) for p in dataset.train]

    def load_text() -> TextTower:
        if own := students.load_text(run / "student"):
            return own
        if isinstance(
            asked.adapt, recipe.Prompts
        ):  # the features were made with its learned context, so words must get it too
            return promptsrc.load_text(asked.teacher, asked.adapt, run / "teacher")
        return teachers.load_text(asked.teacher)

    evaluation = run / "evaluation"

    def evaluation_hashes() -> set[str]:
        record = disk.read_json(evaluation / "evaluation.json")
        if "held_out" in record:
            return set(record["held_out"])
        images = index_tar(evaluation / "images.tar")  # a run of before: of those that it kept
        return {digest(images[i]) for s in record["sets"] if not s.get("seen") for i in s["rows"]}

    manifest = disk.read_manifest(evaluation, "evaluation")
    there = (run / "quantized" / disk.MANIFEST).exists()
    learned = {"quantized": disk.sha256(run / "quantized" / disk.MANIFEST)} if there else {}
    return Source(
        image_encoder=student,
        preprocess=preprocess,
        load_text=load_text if asked.text_encoder else None,
        labels=description["labels"],
        templates=description["templates"],
        class_features=np.load(run / "student" / "class_features.npy"),
        head=head.numpy() if head is not None and head.spec.keep else None,
        logit_scale=description["logit_scale"],
        calibration=training_images,
        evaluation_hashes=evaluation_hashes,
        golden=index_tar(evaluation / "images.tar")[:8],
        golden_license=manifest["license"],
        licenses=description["licenses"],
        parents={
            "student": disk.sha256(run / "student" / disk.MANIFEST),
            **description["parents"],
            **learned,
        },
        quantized=run / "quantized" if learned else None,
    )


class _Normalized(nn.Module):
    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.tower(pixels), dim=-1)


def from_model(
    name: str, weights_name: str, labels: list[str], images: Path | None, text: bool = True
) -> Source:
    """Any open_clip model (by name, or by a JSON file of its configuration), or any timm classifier. text: False leaves the text side out.

    A timm classifier has no text side, but it is a dual encoder all the same: its logits are the image feature and the
    text feature of class i is the i-th unit vector, so the ranking by cosine is exactly the ranking by logit.

    Raises `EdgeclipError` for unknown names, weights that do not fit, or labels that are not the classifier's.
    """
    import open_clip
    import timm

    photos = index_folder(images) if images else []
    if images and not photos:
        raise EdgeclipError(images, "has no images", "give a folder of .jpg, .png or .webp")
    load_text: Callable[[], TextTower] | None
    spec: OpenClip | Timm
    if name in open_clip.list_models() or name.endswith(".json"):
        config = disk.read_json(Path(name)) if name.endswith(".json") else None
        spec = OpenClip(
            model=Path(name).stem if config else name, weights=weights_name, config=config
        )
        if not text:
            return _image_side(spec, labels, photos)
        teacher = open_clip_teacher.load(spec)
        templates = ["a photo of a {c}"]
        features = (
            teacher.encode_text(prompts(labels, templates)).numpy()
            if labels
            else np.zeros((0, teacher.embed_dim), np.float32)
        )
        class_features = ensemble(features[:, None]) if labels else features
        encoder, preprocess, load_text, scale = (
            teacher.tower,
            teacher.preprocess,
            lambda: teachers.load_text(spec),
            teacher.logit_scale,
        )
    else:
        if not timm.is_model(name):
            raise EdgeclipError(
                name,
                "neither an open_clip nor a timm model",
                "see open_clip.list_models() and timm.list_models()",
            )
        spec = Timm(model=name, weights=weights_name, image_size=224)
        encoder, preprocess = weights.timm_model(spec, num_classes=None)
        preprocess = msgspec.structs.replace(
            preprocess, size=encoder.pretrained_cfg["input_size"][-1]
        )  # its own size
        if labels and len(labels) != encoder.num_classes:
            raise EdgeclipError(
                "--labels",
                f"has {len(labels)} labels, {name} has {encoder.num_classes} classes",
                "give the classifier's own labels in its order",
            )
        class_features = (
            np.eye(encoder.num_classes, dtype=np.float32)
            if labels
            else np.zeros((0, encoder.num_classes), np.float32)
        )
        templates, load_text, scale = [], None, 1.0
    return Source(
        image_encoder=_Normalized(encoder).eval(),
        preprocess=preprocess,
        load_text=load_text,
        labels=labels,
        templates=templates,
        class_features=class_features,
        head=None,
        logit_scale=scale,
        calibration=lambda: photos,
        evaluation_hashes=set,
        golden=photos[:8],
        golden_license="the user's own images",
        licenses={"model": "unknown", "data": "none"},
        parents=_parents(spec, labels, photos),
    )


def _image_side(spec: OpenClip, labels: list[str], images: list[ImageRef]) -> Source:
    """An open_clip model's image encoder alone: no labels, no text, for an index or where its tokenizer is not at hand."""
    if labels:
        raise EdgeclipError(
            "--labels", "need the text side to be baked", "drop --image-only, or the labels"
        )
    model, preprocess = weights.open_clip_model(spec)
    encoder = _Normalized(open_clip_teacher.ImageTower(model)).eval()
    with torch.inference_mode():
        width = encoder(torch.zeros(1, 3, preprocess.size, preprocess.size)).shape[1]
    return Source(
        image_encoder=encoder,
        preprocess=preprocess,
        load_text=None,
        labels=[],
        templates=[],
        class_features=np.zeros((0, width), np.float32),
        head=None,
        logit_scale=model.logit_scale.exp().item(),
        calibration=lambda: photos,
        evaluation_hashes=set,
        golden=images[:8],
        golden_license="the user's own images",
        licenses={"model": "unknown", "data": "none"},
        parents=_parents(spec, labels, images),
    )


def _parents(spec: OpenClip | Timm, labels: list[str], images: list[ImageRef]) -> dict[str, Any]:
    """What the bundle is made of, by content: a file may be rewritten under its name."""
    return {
        "model": spec.model,
        "config": disk.fingerprint(getattr(spec, "config", None)),
        "weights": weights.source(spec.weights),
        "labels": disk.fingerprint(labels),
        "images": disk.fingerprint([(p.key, digest(p)) for p in images]),
    }


def with_vocabulary(source: Source, texts: list[str]) -> Source:
    """The source with the tokens of labels, templates and `texts` alone. Raises `EdgeclipError` where it has no text side."""
    if not source.load_text:
        raise EdgeclipError(
            "--vocabulary", "there is no text encoder to keep words of", "leave it out"
        )
    return source._replace(
        vocabulary=texts, parents={**source.parents, "vocabulary": disk.fingerprint(texts)}
    )

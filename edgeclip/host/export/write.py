"""The parts of a bundle's folder, each written by one function; `export` calls them in order."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import torch

from edgeclip import __version__, disk
from edgeclip.device import finite, tokenizer
from edgeclip.device.images import load_pixels, read
from edgeclip.device.manifest import BundleManifest, Golden, TextRecord, read_manifest
from edgeclip.device.metrics import l2_normalize
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.target import NamedTarget, Target
from edgeclip.device.zero_shot import EduAttention, prompts
from edgeclip.errors import EdgeclipError, WrongGraph
from edgeclip.host.export.source import Source
from edgeclip.host.export.vocabulary import prune
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.view import run_model
from edgeclip.host.teachers import TextTower
from edgeclip.progress import say

GOLDEN_TEXTS = [
    "a photo of a cat",
    "a red umbrella",
    "the letter A",
    "two people shaking hands",
    "A dog’s bed",
]
MAX_EXPORT_ERROR = 1e-5
"""largest difference of a unit feature between torch and the traced graph"""
MAX_PIXEL_ERROR = 1e-5
"""of a normalized pixel: rounding, where one level is 1 / 255 or more"""
PACKAGES = (
    "torch",
    "open_clip_torch",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt-rtx-cu13",
)
"""libraries whose version a bundle records"""


def up_to_date(out: Path, name: str, target: Target, source: Source) -> bool:
    """Return whether `out` is a whole bundle of the same target, source and versions.

    Raises `EdgeclipError` where it is, and a file of it was changed.
    """
    if not (out / disk.MANIFEST).exists():
        return False
    try:
        read_manifest(out)
    except EdgeclipError as e:
        say(f"{e}: it is made anew")
        return False
    manifest = disk.read_manifest(out, "bundle")
    wanted = {
        "target": msgspec.to_builtins(_named(name, target)),
        "parents": source.parents,
        "versions": versions(),
    }
    for key, value in wanted.items():
        if manifest.get(key) != value:
            return False
    if bool(manifest.get("text")) != bool(source.load_text):
        return False
    disk.verify(out, manifest)
    return True


def _named(name: str, target: Target) -> NamedTarget:
    return NamedTarget(name=name, **msgspec.structs.asdict(target))


class GoldenAnswers(NamedTuple):
    """Images and what torch answers to them: a device must answer the same."""

    pixels: np.ndarray
    """uint8 [G, H, W, 3]"""
    inputs: np.ndarray
    """float32 [G, 3, H, W]: the pixels, normalized"""
    features: np.ndarray
    """float32 [G, D], unit rows"""


def golden_answers(source: Source) -> GoldenAnswers:
    """Return the golden images, or synthetic ones where there are none, and torch's features."""
    if source.golden:
        images = [load_pixels(image, source.preprocess) for image in source.golden]
    else:
        images = _synthetic(source.preprocess.size)
    pixels = np.stack(images)
    inputs = normalize(pixels, source.preprocess)
    if source.transform is not None and source.golden:
        inputs = _by_reference(source, inputs)
    with torch.inference_mode():
        features = source.image_encoder(torch.from_numpy(inputs)).numpy()
    return GoldenAnswers(pixels, inputs, features)


def _by_reference(source: Source, inputs: np.ndarray) -> np.ndarray:
    """Return the golden images' inputs by the model's own library, float32 [G, 3, H, W].

    Raises `WrongGraph` where edgeclip's are others: a bundle whose preprocess is not the model's.
    """
    assert source.transform is not None
    found = inputs.copy()
    for i, ref in enumerate(source.golden):
        image = open_image(read(ref), ref.key)
        if image.mode != "RGB":  # becomes RGB in edgeclip's way, which is not the model's
            continue
        found[i] = source.transform(image).numpy()
        error = np.abs(found[i] - inputs[i]).max()
        if not error < MAX_PIXEL_ERROR:
            raise WrongGraph(
                ref.key,
                f"the model's own library prepares it otherwise, by up to {error:.1e}",
                "nothing was written; report this with the name of the model",
            )
    return found


def _synthetic(size: int) -> list[np.ndarray]:
    """Two images uint8 [H, W, 3]: a ramp in each channel, and the same turned by 180 degrees."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    return [image, image[::-1, ::-1]]


def compare(which: str, model: onnx.ModelProto, x: np.ndarray, expected: np.ndarray) -> None:
    """Raise `WrongGraph` where the `which` encoder's graph does not give torch's rows for `x`."""
    outputs = run_model(model, {model.graph.input[0].name: x})
    error = np.abs(outputs[model.graph.output[0].name] - expected).max()
    if not error < MAX_EXPORT_ERROR:  # not a number is an error too
        raise WrongGraph(
            f"{which} encoder",
            f"the exported graph differs from torch by {error:.1e} at batch {len(x)}",
            "nothing was written; report this with the name of the model",
        )


def text_encoder(source: Source, target: Target, exporter: ModuleType, folder: Path) -> TextRecord:
    """Write the text encoder, its tokenizer and its golden answers.

    Raises `WrongGraph` where the graph, or the pruned vocabulary, changes the answers.
    """
    assert source.load_text is not None
    text = source.load_text()
    words = text.words()
    ids = tokenizer.encode(words, GOLDEN_TEXTS)
    vocabulary = None
    if source.vocabulary is not None:
        needed = prompts(source.labels, source.templates or ["{c}"])
        pruned = prune(text, [*GOLDEN_TEXTS, *needed, *source.vocabulary])
        vocabulary = pruned.record
        new_ids = tokenizer.renumber(words, ids, pruned.kept, GOLDEN_TEXTS)
        _compare_pruned(text, ids, pruned.text, new_ids)
        text = pruned.text
        ids = new_ids
        disk.write_array(folder / "vocabulary.npy", pruned.kept)
        say(
            f"    {vocabulary.kept:,} tokens kept, {vocabulary.lost:,} removed: the bundle refuses "
            "texts that need one of those"
        )

    example = torch.from_numpy(ids)
    model = graph.to_onnx(text.module, example[:2], "input_ids", "text_features", target.opset)
    with torch.inference_mode():
        features = text.module(example).numpy()
    compare("text", model, ids, features)

    disk.write_text(folder / "tokenizer.json", text.tokenizer)
    disk.write_array(folder / "golden" / "text_features.npy", l2_normalize(features))
    disk.write_text(folder / "golden" / "texts.json", json.dumps(GOLDEN_TEXTS))
    return TextRecord(
        encoder=exporter.write_text(model, target, folder),
        context_length=text.context_length,
        cleaning=text.cleaning,
        vocabulary=vocabulary,
    )


def _compare_pruned(
    whole: TextTower, ids: np.ndarray, pruned: TextTower, new_ids: np.ndarray
) -> None:
    """Raise `WrongGraph` where a kept text's features are not the same bit for bit."""
    with torch.inference_mode():
        before = whole.module(torch.from_numpy(ids))
        after = pruned.module(torch.from_numpy(new_ids))
    if not torch.equal(before, after):
        raise WrongGraph(
            "--vocabulary",
            "removing tokens changed the features of texts that keep all of theirs",
            "leave --vocabulary out, and report this",
        )


def labels_and_head(source: Source, folder: Path) -> None:
    """Write labels.json, class_features.npy and, for a student with EduAttention, head.npz."""
    disk.write_json(folder / "labels.json", source.labels)
    do = "train the student again, or check the text encoder: these are no numbers"
    features = finite.features(source.class_features, "class features", do)
    disk.write_array(folder / "class_features.npy", features)
    if source.head is not None:
        _write_head(source.head, folder / "head.npz")


def _write_head(head: EduAttention, path: Path) -> None:
    for name in ("weight", "bias", "alpha", "temperature"):
        finite.finite(np.asarray(getattr(head, name)), f"head: {name}", "train the student again")
    np.savez(
        path,
        weight=head.weight,
        bias=head.bias,
        alpha=np.float32(head.alpha),
        temperature=np.float32(head.temperature),
        fc=np.str_(head.fc),
        normalize=np.bool_(head.normalize),
        center=np.bool_(head.center),
    )


def golden(source: Source, answers: GoldenAnswers, folder: Path) -> Golden:
    """Write the golden images, their pixels and their features to golden/."""
    names = []
    for i, image in enumerate(source.golden):
        suffix = Path(image.key).suffix or ".png"
        name = f"golden/{i}{suffix}"
        (folder / name).write_bytes(read(image))
        names.append(name)
    disk.write_array(folder / "golden" / "pixels.npy", answers.pixels)
    disk.write_array(folder / "golden" / "image_features.npy", answers.features)
    return Golden(images=names, license=source.golden_license)


def manifest(source: Source, name: str, target: Target, **written: Any) -> BundleManifest:
    """Return the manifest; `written`: the fields that say what was written and how."""
    return BundleManifest(
        target=_named(name, target),
        runtime=target.runtime,
        preprocess=source.preprocess,
        logit_scale=source.logit_scale,
        class_offset=source.class_offset,
        templates=source.templates,
        licenses=source.licenses,
        parents=source.parents,
        versions=versions(),
        **written,
    )


def versions() -> dict[str, str]:
    """Return the versions of edgeclip and of the libraries that decide what a graph looks like."""
    found = {"edgeclip": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

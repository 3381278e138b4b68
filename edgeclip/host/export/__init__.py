"""`edgeclip export`: a source and a target become a bundle, or nothing at all.

The float graph is compared with torch at two batch sizes before it is converted, so a wrong trace never ships; what
the conversion to int8 costs is `validate`'s question.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgeclip import __version__, disk
from edgeclip.device.images import read
from edgeclip.device.metrics import l2_normalize
from edgeclip.device.preprocess import normalize, open_image, to_pixels
from edgeclip.device.records import FORMAT
from edgeclip.device.target import Target
from edgeclip.device.zero_shot import class_scores, prompts
from edgeclip.host.export import calibration, tensorrt
from edgeclip.host.export.search import search
from edgeclip.host.export.source import Source
from edgeclip.host.export.vocabulary import prune
from edgeclip.host.graph import learned
from edgeclip.host.graph import trace as graph
from edgeclip.host.towers.fold import fold
from edgeclip.progress import say

EXPORTERS = {
    "onnxruntime": "edgeclip.host.export.onnxruntime",
    "openvino": "edgeclip.host.export.openvino",
    "tensorrt": "edgeclip.host.export.tensorrt",
}
GOLDEN_TEXTS = ["a photo of a cat", "a red umbrella", "the letter A", "two people shaking hands"]
MAX_EXPORT_ERROR = 1e-5


def export(source: Source, name: str, target: Target, out: Path) -> Path:
    """Writes the bundle of `source` for `target` to `out`; returns it.

    Raises `EdgeclipError` for too few calibration images or a missing runtime, `AssertionError` when the exported
    graph does not compute what torch computes.
    """
    if _up_to_date(out, name, target, source):
        say(f"{out}: up to date (delete it to export anew)")
        return out
    disk.refuse_foreign(out, "bundle")  # before the work, not after it
    exporter = importlib.import_module(EXPORTERS[target.runtime])
    size = source.preprocess.size
    pixels = _golden_pixels(source)
    golden_input = torch.from_numpy(normalize(pixels, source.preprocess))
    with torch.inference_mode():
        golden_features = source.image_encoder(golden_input).numpy()

    say(f"1/5 fold and trace the image encoder at {size} px")
    encoder = fold(source.image_encoder, golden_input[:1])
    model = graph.to_onnx(encoder, golden_input[:1], "pixels", "image_features", target.opset)
    for batch in (1, 3):
        x = golden_input[[i % len(golden_input) for i in range(batch)]].numpy()
        error = np.abs(
            _run_float(model, x) - golden_features[[i % len(golden_features) for i in range(batch)]]
        ).max()
        assert error < MAX_EXPORT_ERROR, (
            f"the exported graph differs from torch by {error:.1e} at batch {batch}"
        )

    quantization, record, used = None, None, list[dict[str, str]]()
    if target.calibration:
        images = calibration.draw(source, target.calibration)
        used = images.used
        say(
            f"search for the form of {name}: ranges of {len(images.ranges)} training images, judged on {len(images.judged)}"
        )
        scales = None
        if source.quantized:
            scales = learned.load(source.quantized, source.image_encoder, target, images.ranges)
        quantization, record = search(model, images, target, exporter, _answers(source), scales)
    say(
        f"2/5 write the image encoder as {name}"
        + (
            f", {quantization.int8_share:.1%} of the multiply-accumulates in int8"
            if quantization
            else ""
        )
    )
    with disk.new_folder(out) as folder:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "target": {"name": name, **msgspec.to_builtins(target)},
            "runtime": target.runtime,
            "image_encoder": exporter.write(model, target, quantization, folder),
            "preprocess": msgspec.to_builtins(source.preprocess),
            "logit_scale": source.logit_scale,
            "embed_dim": int(golden_features.shape[1]),
            "templates": source.templates,
            "text": None,
            "licenses": source.licenses,
            "parents": source.parents,
            "calibration": used,
            "quantization": record,
            "versions": _versions(),
        }
        (folder / "golden").mkdir()
        if source.load_text:
            say("3/5 write the text encoder")
            manifest["text"] = _write_text(source, target, exporter, folder)
        say("4/5 write labels, head and golden answers")
        disk.write_json(folder / "labels.json", source.labels)
        disk.write_array(folder / "class_features.npy", source.class_features)
        if source.head is not None:
            h = source.head
            scalars: dict[str, Any] = {
                "alpha": np.float32(h.alpha),
                "temperature": np.float32(h.temperature),
                "fc": np.str_(h.fc),
                "normalize": np.bool_(h.normalize),
            }
            np.savez(folder / "head.npz", weight=h.weight, bias=h.bias, **scalars)
        for i, image in enumerate(source.golden):
            (folder / "golden" / f"{i}{Path(image.key).suffix or '.png'}").write_bytes(read(image))
        disk.write_array(folder / "golden" / "pixels.npy", pixels)
        disk.write_array(folder / "golden" / "image_features.npy", golden_features)
        manifest["golden"] = {
            "images": [
                f"golden/{i}{Path(p.key).suffix or '.png'}" for i, p in enumerate(source.golden)
            ],
            "license": source.golden_license,
        }
        manifest["lint"] = None
        if target.runtime == "tensorrt":
            say("5/5 check with TensorRT-RTX's parser and builder")
            manifest["lint"] = tensorrt.require_legal(folder / manifest["image_encoder"], target)
            if manifest["text"]:
                tensorrt.require_legal(folder / manifest["text"]["encoder"], target)
            if manifest["lint"]["checked_by"] is None:
                say("checked by the rules alone, not by TensorRT-RTX: pip install 'edgeclip[lint]'")
            tensorrt.write_build_script(folder)
        manifest["image_encoder_bytes"] = sum(
            f.stat().st_size for f in folder.glob("image_encoder.*")
        )
        disk.write_manifest(folder, "bundle", manifest)
    return out


def _up_to_date(out: Path, name: str, target: Target, source: Source) -> bool:
    """Is there a whole bundle of the same target, source and versions?"""
    if not (out / disk.MANIFEST).exists():
        return False
    manifest = disk.read_manifest(out, "bundle")
    wanted = {
        "target": {"name": name, **msgspec.to_builtins(target)},
        "parents": source.parents,
        "versions": _versions(),
    }
    if any(manifest.get(k) != v for k, v in wanted.items()) or bool(manifest["text"]) != bool(
        source.load_text
    ):
        return False
    disk.verify(out, manifest)
    return True


def _golden_pixels(source: Source) -> np.ndarray:
    """uint8 [G, H, W, 3]: the golden images, or two synthetic ones where the source has none."""
    if source.golden:
        return np.stack(
            [to_pixels(open_image(read(p), p.key), source.preprocess) for p in source.golden]
        )
    ramp = np.linspace(0, 255, source.preprocess.size).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    return np.stack([image, image[::-1, ::-1]])


def _answers(source: Source) -> Callable[[np.ndarray], np.ndarray] | None:
    """Image features [n, D] to each image's best class; None for a student without labels."""
    if not source.labels:
        return None
    return lambda features: class_scores(features, source.class_features, source.head).argmax(
        axis=1
    )


def _write_text(source: Source, target: Target, exporter: Any, folder: Path) -> dict[str, Any]:
    assert source.load_text is not None
    from edgeclip.device import tokenizer

    text = source.load_text()
    words = tokenizer.load(text.tokenizer, text.context_length)
    ids = torch.from_numpy(tokenizer.encode(words, GOLDEN_TEXTS, text.context_length))
    kept: dict[str, Any] | None = None
    if source.vocabulary is not None:
        with torch.inference_mode():
            whole = text.module(ids)
        text, own, kept = prune(
            text,
            [
                *GOLDEN_TEXTS,
                *prompts(source.labels, source.templates or ["{c}"]),
                *source.vocabulary,
            ],
        )
        ids = torch.from_numpy(tokenizer.renumber(words, ids.numpy(), own, GOLDEN_TEXTS))
        with torch.inference_mode():
            assert torch.equal(text.module(ids), whole), (
                "pruning the vocabulary changed the features of kept texts"
            )
        disk.write_array(folder / "vocabulary.npy", own)
        say(
            f"    {kept['kept']:,} tokens kept, {kept['lost']:,} lost: texts that have one of those are refused"
        )
    model = graph.to_onnx(text.module, ids[:2], "input_ids", "text_features", target.opset)
    with torch.inference_mode():
        features = text.module(ids).numpy()
    error = np.abs(_run_float(model, ids.numpy()) - features).max()
    assert error < MAX_EXPORT_ERROR, f"the exported text encoder differs from torch by {error:.1e}"
    disk.write_text(folder / "tokenizer.json", text.tokenizer)
    disk.write_array(folder / "golden" / "text_features.npy", l2_normalize(features))
    disk.write_text(folder / "golden" / "texts.json", json.dumps(GOLDEN_TEXTS))
    return {
        "encoder": exporter.write_text(model, target, folder),
        "context_length": text.context_length,
        "vocabulary": kept,
    }


def _run_float(model: Any, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return out


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"edgeclip": __version__}
    for package in (
        "torch",
        "open_clip_torch",
        "timm",
        "onnx",
        "onnxruntime",
        "openvino",
        "nncf",
        "tensorrt-rtx-cu13",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

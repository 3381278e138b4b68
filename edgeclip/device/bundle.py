"""A bundle: what ships. A folder that needs no torch, knows where it came from, and can prove that it still works.

image_encoder.onnx | .xml + .bin    float32 [B, 3, H, W] to unit image_features [B, D]: P(u_s)
class_features.npy, labels.json     [N, D] baked words; the head is a matrix product
head.npz                            EduAttention over the active class matrix, where it was kept
text_encoder.*, tokenizer.json      optional; opened only for words that were never baked
vocabulary.npy                      [K] ids of the tokens that the text encoder has, where it was exported with some alone
golden/                             images and texts, with the fp32 torch student's own answers
manifest.json                       last: preprocess, runtime, target, parents, versions, licenses, sha256 of every file

bundle = Bundle.load("runs/latest/bundles/onnx-int8")
bundle.classify("cat.jpg", ["a cat", "a dog"])
"""

import json
import platform
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edgeclip import disk
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.runtime import Session, open_session
from edgeclip.device.zero_shot import EduAttention, class_scores, ensemble, prompts
from edgeclip.errors import EdgeclipError

FORMAT = 1
"""of the manifest and what it lists"""
OLD = "was written by an older edgeclip"
TEXT_BATCH = 32


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `EdgeclipError` for an unfinished bundle, and for one of another format."""
    manifest = disk.read_manifest(folder, "bundle")
    if manifest.get("format") != FORMAT:
        raise EdgeclipError(
            folder,
            f"is of format {manifest.get('format')}, and this edgeclip reads {FORMAT}",
            "export it anew",
        )
    return manifest


class Bundle:
    """Opens what it needs when it is needed. Not safe to share between threads."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        threads: int,
        providers: tuple[str, ...] | None = None,
    ):
        self.folder, self.manifest, self.threads, self.providers = (
            folder,
            manifest,
            threads,
            providers,
        )
        self.preprocess = msgspec.convert(manifest["preprocess"], Preprocess)
        self.logit_scale: float = manifest["logit_scale"]

    @classmethod
    def load(
        cls,
        folder: str | Path,
        threads: int = 1,
        check: bool = False,
        providers: tuple[str, ...] | None = None,
    ) -> "Bundle":
        """Raises `EdgeclipError` for an unfinished bundle. providers: ONNX Runtime's, all of which must take part; None: its CPU.

        Every file is compared with the manifest's sha256 when it is opened; check: compare all of them now.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if check:
            disk.verify(folder, manifest)
        return cls(folder, manifest, threads, providers)

    def file(self, name: str) -> Path:
        """A file of the bundle that is what the manifest says. OpenVINO's .bin goes with its .xml."""
        names = [
            n for n in (name, str(Path(name).with_suffix(".bin"))) if n in self.manifest["files"]
        ]
        disk.verify(
            self.folder,
            {**self.manifest, "files": {n: self.manifest["files"][n] for n in names or [name]}},
        )
        return self.folder / name

    def open_image_encoder(self, threads: int | None = None, optimization: str = "all") -> Session:
        return open_session(
            self.manifest["runtime"],
            self.file(self.manifest["image_encoder"]),
            threads or self.threads,
            optimization,
            self.providers,
        )

    @cached_property
    def image_encoder(self) -> Session:
        return self.open_image_encoder()

    @property
    def precision(self) -> str:
        """What is stored and what is computed. Of CPUs ONNX Runtime alone has fp16 kernels, of some versions, operations and ARM cores."""
        stored: str = self.manifest["target"]["precision"]
        providers = self.image_encoder.facts["providers"]
        if stored != "fp16" or providers not in (["CPUExecutionProvider"], ["CPU"]):
            return stored
        unknown = providers == ["CPUExecutionProvider"] and platform.machine() == "aarch64"
        return f"fp16 stored, {'fp16 or fp32' if unknown else 'fp32'} computed"

    @cached_property
    def text_encoder(self) -> Session:
        if not self.manifest["text"]:
            raise EdgeclipError(
                self.folder,
                "this bundle has no text encoder, so it knows its baked labels only",
                "export it with one (recipe: text_encoder: true)",
            )
        return open_session(
            self.manifest["runtime"],
            self.file(self.manifest["text"]["encoder"]),
            self.threads,
            "all",
            self.providers,
        )

    @cached_property
    def labels(self) -> list[str]:
        labels: list[str] = json.loads(self.file("labels.json").read_text(encoding="utf-8"))
        return labels

    @cached_property
    def class_features(self) -> np.ndarray:
        """[N, D], unit rows."""
        return np.load(self.file("class_features.npy"))

    @cached_property
    def head(self) -> EduAttention | None:
        if "head.npz" not in self.manifest["files"]:
            return None
        with np.load(self.file("head.npz"), allow_pickle=False) as z:
            if "fc" not in z:
                raise EdgeclipError(self.folder, OLD, "export it anew")
            return EduAttention(
                z["weight"],
                z["bias"],
                float(z["alpha"]),
                float(z["temperature"]),
                str(z["fc"]),
                bool(z["normalize"]),
            )

    def pixels(self, image: str | Path | bytes | Image.Image) -> np.ndarray:
        """uint8 [H, W, 3]. Raises `EdgeclipError` for an image that cannot be read."""
        if not isinstance(image, Image.Image):
            image = open_image(Path(image) if isinstance(image, str) else image)
        return to_pixels(image.convert("RGB"), self.preprocess)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """[B, D] unit rows from uint8 [B, H, W, 3]."""
        return self.image_encoder.run(normalize(pixels, self.preprocess))

    def encode_image(self, images: list[Any]) -> np.ndarray:
        """[B, D] unit rows from paths, encoded bytes or PIL images."""
        return np.concatenate([self.encode_pixels(self.pixels(i)[None]) for i in images])

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """[N, D] unit rows, of texts as they are: no prompt template is put around them.

        Raises `EdgeclipError` for a text that is too long, or has a token that the bundle was exported without.
        """
        from edgeclip.device import tokenizer  # the library is needed for new words only

        text = self.manifest["text"]
        encoder = self.text_encoder
        words = tokenizer.load(
            self.file("tokenizer.json").read_text(encoding="utf-8"), text["context_length"]
        )
        ids = tokenizer.encode(words, texts, text["context_length"])
        if text.get("vocabulary"):
            ids = tokenizer.renumber(words, ids, np.load(self.file("vocabulary.npy")), texts)
        ids = ids.astype(encoder.input.dtype)
        return np.concatenate(
            [encoder.run(ids[i : i + TEXT_BATCH]) for i in range(0, len(ids), TEXT_BATCH)]
        )

    def bake(self, labels: list[str]) -> np.ndarray:
        """[N, D] class features of any labels, through the bundle's own prompt templates."""
        if not labels:
            raise EdgeclipError("labels", "the list is empty", "give at least one")
        if repeated := sorted({x for x in labels if labels.count(x) > 1}):
            raise EdgeclipError(
                "labels", f"'{repeated[0]}' occurs more than once", "give each label once"
            )
        templates = self.manifest["templates"] or ["{c}"]
        return ensemble(
            self.encode_text(prompts(labels, templates)).reshape(len(labels), len(templates), -1)
        )

    def classify(
        self, image: str | Path | bytes | Image.Image, labels: list[str] | None = None, top: int = 5
    ) -> list[dict[str, Any]]:
        """The `top` best labels, best first: label, cosine score, and probability among the active labels."""
        if labels is None:
            labels, active = self.labels, self.class_features
            if not labels:
                raise EdgeclipError(self.folder, "this bundle has no baked labels", "give --labels")
        else:
            known = {label: i for i, label in enumerate(self.labels)}
            baked = all(label in known for label in labels) and labels
            active = (
                self.class_features[[known[label] for label in labels]]
                if baked
                else self.bake(labels)
            )
        scores = class_scores(self.encode_pixels(self.pixels(image)[None]), active, self.head)[0]
        logits = self.logit_scale * (scores - scores.max())
        probability = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-scores, kind="stable")[:top]
        return [
            {"label": labels[i], "score": float(scores[i]), "probability": float(probability[i])}
            for i in best
        ]


def bake_labels(bundle_folder: Path, labels: list[str], out: Path) -> Path:
    """A copy of a bundle at `out` with other baked labels, no retraining; its parent is the old bundle.

    Raises `EdgeclipError` when the bundle has no text encoder or the list is empty or repeats a label.
    """
    bundle = Bundle.load(bundle_folder, check=True)
    features = bundle.bake(labels)
    with disk.new_folder(out) as folder:
        shutil.copytree(bundle_folder, folder, dirs_exist_ok=True)
        (folder / disk.MANIFEST).unlink()
        disk.write_json(folder / "labels.json", labels)
        disk.write_array(folder / "class_features.npy", features)
        content = {k: v for k, v in bundle.manifest.items() if k not in ("kind", "files")}
        content["parents"] = {
            **content["parents"],
            "bundle": disk.sha256(bundle_folder / disk.MANIFEST),
        }
        disk.write_manifest(folder, "bundle", content)
    return out

"""A bundle: what ships. A folder that needs no torch and can prove that it still answers as it did.

    bundle = Bundle.load("runs/latest/bundles/onnx-int8")
    bundle.classify("cat.jpg", ["a cat", "a dog"])

docs/bundle.md lists its files and the fields of its manifest.
"""

import collections
import contextlib
import platform
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypedDict

import msgspec
import numpy as np
from PIL import Image

from edgeclip import disk
from edgeclip.device import contents
from edgeclip.device.manifest import BundleManifest, TextRecord, read_manifest, write_manifest
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.runtime import Session, open_session, references
from edgeclip.device.zero_shot import EduAttention, class_scores, ensemble, offsets, prompts
from edgeclip.errors import EdgeclipError

if TYPE_CHECKING:
    from edgeclip.device.tokenizer import Words

TEXT_BATCH = 32
EXPORT_AGAIN = "export the bundle again from a student that was scored"
ImageSource = str | Path | bytes | Image.Image
"""a path, an encoded image, or a PIL image"""


class RankedLabel(TypedDict):
    label: str
    score: float
    """cosine, or what EduAttention makes of it"""
    probability: float
    """among the active labels, 0..1"""


class Bundle:
    """Opens each file when it is needed. Not safe to share between threads.

    Every file is compared with the manifest's sha256 when it is opened.
    """

    def __init__(
        self,
        folder: Path,
        manifest: BundleManifest,
        threads: int,
        providers: tuple[str, ...] | None = None,
    ):
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.providers = providers
        self._baked: tuple[list[str], np.ndarray] | None = None
        """the last new labels, and their class features"""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        threads: int = 1,
        check: bool = False,
        providers: tuple[str, ...] | None = None,
    ) -> "Bundle":
        """Return the bundle at `folder`.

        check: compare every file with its sha256 now. providers: ONNX Runtime's execution
        providers, all of which must take part; None: the CPU. Raises `EdgeclipError` for an
        unfinished bundle, and for one of a format that this edgeclip does not read.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if check:
            disk.verify_files(folder, manifest.files, "bundle")
        return cls(folder, manifest, threads, providers)

    @property
    def preprocess(self) -> Preprocess:
        return self.manifest.preprocess

    @property
    def logit_scale(self) -> float:
        return self.manifest.logit_scale

    def file(self, name: str) -> Path:
        """Return the path of a file whose bytes are what the manifest says.

        What a graph needs beside itself, as OpenVINO's .bin, is checked with it. Raises
        `EdgeclipError` for a file that was changed or that the bundle does not have.
        """
        files = self.manifest.files
        if name not in files:
            raise EdgeclipError(self.folder, f"has no {name}", "export the bundle again")

        checked = {name: files[name]}
        disk.verify_files(self.folder, checked, "bundle")
        for other in references.others(self.folder / name):
            beside = (PurePosixPath(name).parent / other).as_posix()
            if beside not in files:
                what = f"{name} needs {other}, which its manifest does not list"
                raise EdgeclipError(self.folder, what, "export the bundle again")
            disk.verify_files(self.folder, {beside: files[beside]}, "bundle")
        return self.folder / name

    def open_image_encoder(self, threads: int | None = None, optimization: str = "all") -> Session:
        """Return a new session of the image encoder. optimization: 'all' or 'basic'."""
        return open_session(
            self.manifest.runtime,
            self.file(self.manifest.image_encoder),
            threads or self.threads,
            optimization,
            self.providers,
        )

    @cached_property
    def image_encoder(self) -> Session:
        return self.open_image_encoder()

    @property
    def size_bytes(self) -> int:
        """Of all files that ship."""
        names = [*self.manifest.files, disk.MANIFEST]
        return sum((self.folder / name).stat().st_size for name in names)

    @property
    def precision(self) -> str:
        """What is stored, and where it may differ what is computed.

        Of CPU runtimes only ONNX Runtime has fp16 kernels: some versions, operators and ARM cores.
        """
        stored = self.manifest.target.precision
        providers = self.image_encoder.facts.providers
        if stored != "fp16" or providers not in (["CPUExecutionProvider"], ["CPU"]):
            return stored
        if providers == ["CPUExecutionProvider"] and platform.machine() == "aarch64":
            return "fp16 stored, fp16 or fp32 computed"
        return "fp16 stored, fp32 computed"

    @cached_property
    def text_encoder(self) -> Session:
        """Raises `EdgeclipError` where the bundle has baked labels only."""
        return open_session(
            self.manifest.runtime,
            self.file(self._text().encoder),
            self.threads,
            "all",
            self.providers,
        )

    def _text(self) -> TextRecord:
        if self.manifest.text is None:
            raise EdgeclipError(
                self.folder,
                "this bundle has no text encoder, so it knows its baked labels only",
                "export it with one (recipe: text_encoder: true)",
            )
        return self.manifest.text

    @cached_property
    def labels(self) -> list[str]:
        """The baked labels; empty where there are none."""
        return contents.labels(self.file("labels.json"))

    @cached_property
    def class_features(self) -> np.ndarray:
        """[N, D] unit rows, in the order of `labels`."""
        file = self.file("class_features.npy")
        return contents.rows(file, len(self.labels), self.manifest.embed_dim)

    @cached_property
    def head(self) -> EduAttention | None:
        if "head.npz" not in self.manifest.files:
            return None
        return contents.head(self.file("head.npz"), self.manifest.embed_dim, self.folder)

    # --- the golden images and texts, and what the student answered to them

    def golden_pixels(self) -> np.ndarray:
        """Return uint8 [G, H, W, 3]."""
        return contents.pixels(self.file("golden/pixels.npy"), self.preprocess.size)

    def golden_features(self, kind: str = "image") -> np.ndarray:
        """Return float32 [G, D]; kind: 'image' or 'text'."""
        file = self.file(f"golden/{kind}_features.npy")
        return contents.rows(file, None, self.manifest.embed_dim)

    def golden_texts(self) -> list[str]:
        """Return the texts, in the order of their features."""
        return contents.golden_texts(self.file("golden/texts.json"))

    @cached_property
    def offsets(self) -> np.ndarray | float:
        """What is taken from the scores of the baked labels, [N]; 0.0: nothing."""
        return offsets(self.manifest.class_offset, self.labels)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return the scores [B, N] of unit rows [B, D] over the baked labels, `classify`'s own."""
        return class_scores(features, self.class_features, self.head, offsets=self.offsets)

    # --- images

    def pixels(self, image: ImageSource) -> np.ndarray:
        """Return uint8 [H, W, 3]. Raises `EdgeclipError` for an image that cannot be read."""
        if isinstance(image, str):
            image = Path(image)
        if not isinstance(image, Image.Image):
            image = open_image(image)
        return to_pixels(image, self.preprocess)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Return unit rows [B, D] of uint8 [B, H, W, 3].

        Raises `EdgeclipError` where the graph does not take or give what the manifest says.
        """
        found = self.image_encoder.run(normalize(pixels, self.preprocess))
        return self._of_width(found, len(pixels))

    def _of_width(self, found: np.ndarray, count: int) -> np.ndarray:
        """Return a graph's answer. Raises `EdgeclipError` unless it is float32 [count, D]."""
        wanted = (count, self.manifest.embed_dim)
        if found.dtype != np.float32 or found.shape != wanted:
            what = f"a graph gives {found.dtype} {list(found.shape)}, not float32 {list(wanted)}"
            raise EdgeclipError(self.folder, what, "export the bundle again")
        return found

    def encode_image(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Return unit rows [B, D] of paths, encoded bytes or PIL images."""
        return np.concatenate([self._encode_one(image) for image in images])

    def _encode_one(self, image: ImageSource) -> np.ndarray:
        """Return a unit row [1, D]. Raises `EdgeclipError` for what is none."""
        found = self.encode_pixels(self.pixels(image)[None])
        contents.refuse_not_unit(found, self.folder)
        return found

    # --- words

    @cached_property
    def words(self) -> "Words":
        """The tokenizer. Raises `EdgeclipError` without a text encoder or its library."""
        from edgeclip.device import tokenizer  # its library is needed for new words only

        text = self._text()
        content = self.file("tokenizer.json").read_text(encoding="utf-8")
        return tokenizer.load(content, text.context_length, text.cleaning)

    def token_ids(self, texts: list[str]) -> np.ndarray:
        """Return int64 [N, L], ids of the tokenizer's whole vocabulary.

        Raises `EdgeclipError` for a text that is too long, and as `words`.
        """
        from edgeclip.device import tokenizer

        return tokenizer.encode(self.words, texts)

    def encode_ids(self, ids: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return unit rows [N, D] of `token_ids` [N, L]; texts: what messages call them.

        Raises `EdgeclipError` for a token that the bundle was exported without.
        """
        from edgeclip.device import tokenizer

        vocabulary = self._text().vocabulary
        if vocabulary is not None:
            kept = contents.kept_tokens(self.file("vocabulary.npy"), vocabulary.kept)
            ids = tokenizer.renumber(self.words, ids, kept, texts)
        encoder = self.text_encoder
        ids = ids.astype(encoder.input.dtype)
        rows = []
        for start in range(0, len(ids), TEXT_BATCH):
            batch = ids[start : start + TEXT_BATCH]
            rows.append(self._of_width(encoder.run(batch), len(batch)))
        return np.concatenate(rows)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """Return unit rows [N, D] of texts as they are: no prompt template is put around them.

        Raises `EdgeclipError` for a text that is too long or has a token that the bundle was
        exported without, and where the bundle has no text encoder.
        """
        rows = []
        for start in range(0, len(texts), TEXT_BATCH):  # a row of ids is as long as the context
            batch = texts[start : start + TEXT_BATCH]
            rows.append(self.encode_ids(self.token_ids(batch), batch))
        return np.concatenate(rows)

    def bake(self, labels: list[str]) -> np.ndarray:
        """Return class features [N, D] of any labels, through the bundle's prompt templates.

        Raises `EdgeclipError` for no labels, for one that is given twice or has the tokens of
        another, and as `encode_text`.
        """
        from edgeclip.device import tokenizer

        _refuse_repeated(labels)
        templates = self.manifest.templates or ["{c}"]
        tokenizer.check_class_names(self.words, labels, templates)
        features = self.encode_text(prompts(labels, templates))
        contents.refuse_not_unit(features, self.folder)
        return ensemble(features.reshape(len(labels), len(templates), -1))

    def classify(
        self,
        image: ImageSource,
        labels: list[str] | None = None,
        top: int = 5,
        offset: bool = True,
    ) -> list[RankedLabel]:
        """Return the `top` best labels of an image, best first.

        labels: the active ones; None: the baked ones. Labels that are baked need no text encoder.
        offset: False leaves the manifest's `class_offset` out. Raises `EdgeclipError` for an image
        that cannot be read, and as `bake`.
        """
        active_labels, active = self._active(labels)
        features = self._encode_one(image)
        set_back: np.ndarray | float = 0.0
        if offset:
            set_back = offsets(self.manifest.class_offset, active_labels)
        scores = class_scores(features, active, self.head, offsets=set_back)[0]

        logits = self.logit_scale * (scores - scores.max())
        probability = np.exp(logits) / np.exp(logits).sum()

        ranked: list[RankedLabel] = []
        for i in np.argsort(-scores, kind="stable")[:top]:
            ranked.append(
                {
                    "label": active_labels[i],
                    "score": float(scores[i]),
                    "probability": float(probability[i]),
                }
            )
        return ranked

    def _active(self, labels: list[str] | None) -> tuple[list[str], np.ndarray]:
        """Return the labels to choose from, and their class features [N, D]."""
        if labels is None:
            if not self.labels:
                raise EdgeclipError(self.folder, "this bundle has no baked labels", "give --labels")
            return self.labels, self.class_features

        _refuse_repeated(labels)
        row = {label: i for i, label in enumerate(self.labels)}
        if all(label in row for label in labels):
            return labels, self.class_features[[row[label] for label in labels]]
        if self._baked is None or self._baked[0] != labels:
            self._baked = (list(labels), self.bake(labels))
        return self._baked


def _refuse_repeated(labels: list[str]) -> None:
    if not labels:
        raise EdgeclipError("labels", "the list is empty", "give at least one")
    for label, times in collections.Counter(labels).items():
        if times > 1:
            raise EdgeclipError(
                "labels", f"'{label}' occurs more than once", "give each label once"
            )


def bake_labels(bundle_folder: Path, labels: list[str], out: Path, offset: bool = True) -> Path:
    """Write a copy of a bundle with other baked labels to `out`, without training; return `out`.

    The old bundle is its parent. offset: False leaves its class offset out; else those of `labels`
    that it is for keep it. Raises `EdgeclipError` when the bundle has no text encoder, the list is
    empty or repeats a label, or nothing can be put at `out`.
    """
    disk.refuse_foreign(out, "bundle")  # before the work, not after it
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk.locked(out, wait=True))
        same_place = out.resolve() == bundle_folder.resolve()
        if not same_place:
            stack.enter_context(disk.reading(bundle_folder))
        bundle = Bundle.load(bundle_folder, check=True)
        if same_place and bundle.labels == labels and (offset or not bundle.manifest.class_offset):
            return out  # as when the command that made it was killed at its end, and runs again
        features = bundle.bake(labels)
        parents = {**bundle.manifest.parents, "bundle": disk.sha256(bundle_folder / disk.MANIFEST)}
        with disk.new_folder(out) as folder:
            for name in bundle.manifest.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle_folder / name, folder / name)
            disk.write_json(folder / "labels.json", labels)
            disk.write_array(folder / "class_features.npy", features)
            manifest = msgspec.structs.replace(bundle.manifest, parents=parents)
            if not offset:
                manifest = msgspec.structs.replace(manifest, class_offset=None)
            write_manifest(folder, manifest)
        return out

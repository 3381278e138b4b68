"""CLIP_benchmark as judge: its own command line and `main`, with a bundle as one more model type.

    python -m edgeclip.clip_benchmark eval --model_type edgeclip --model BUNDLE --pretrained ''

CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark) has no hook for models of others, so that one is
put into its dictionary of model types. What it does then is its own: it reads images and labels,
makes the prompts, multiplies image features with class features, and counts.

Its score is a product of rows that it divides by their norms. The head that ships is more than
that: EduAttention makes v of an image's features u, and an offset o_i is taken from class i. Two
further coordinates say it all the same:

    image     (v, 1, 0)
    class i   (w_i, -o_i, sqrt(R^2 - |w_i|^2 - o_i^2))        R^2 = max_i |w_i|^2 + o_i^2

Their product is v w_i - o_i, the score of `Bundle.classify`. Every class has the norm R, and a
division of all of an image's scores by one number leaves their order. In float64, so that nothing
is lost on the way, and since torch's autocast, which CLIP_benchmark turns on, leaves float64 alone.
"""

import functools
import re
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edgeclip.device.bundle import Bundle
from edgeclip.device.preprocess import Preprocess, to_pixels
from edgeclip.device.zero_shot import prompts, sharpened
from edgeclip.errors import EdgeclipError

MODEL_TYPE = "edgeclip"
AS_IT_SHIPS, FEATURES = PRETRAINED = ("", "features")
"""what --pretrained says of a bundle, whose weights are its own: what of it is judged"""
INSTALL = "pip install 'edgeclip[clip-benchmark]', in an environment of its own"


class ShippedHead:
    """A bundle's labels and head, called as CLIP_benchmark calls a model.

    Raises `EdgeclipError` for a bundle without baked labels.
    """

    def __init__(self, bundle: Bundle):
        if not bundle.labels:
            raise EdgeclipError(
                bundle.folder, "has no baked labels", f"give --pretrained {FEATURES}"
            )
        self.bundle = bundle
        self.classes = extended(bundle.class_features, bundle.offsets)
        """[N, D + 2]"""
        self.row_of = {self._prompts(label): i for i, label in enumerate(bundle.labels)}
        self.active: list[int] = []
        """rows of the labels that were asked for: over these the head attends"""

    def _prompts(self, label: str) -> frozenset[str]:
        return frozenset(prompts([label], self.bundle.manifest.templates or ["{c}"]))

    def eval(self) -> None:
        """Do nothing: a bundle has no other mode."""

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return the row of the label that all T prompts `texts` are of, once for each, int64 [T].

        Raises `EdgeclipError` where they are not exactly the prompts of one of the bundle's labels:
        its class features are those of no other.
        """
        row = self.row_of.get(frozenset(texts))
        if row is None:
            shown = ", ".join(f"'{text}'" for text in texts[:2])
            wanted = ", ".join(f"'{text}'" for text in sorted(self._prompts(self.bundle.labels[0])))
            raise EdgeclipError(
                f"prompts {shown}",
                f"are of none of the bundle's {len(self.bundle.labels)} labels in its own"
                f" templates (those of its first label: {wanted})",
                "take a data set with the bundle's class names and templates, or have its text"
                f" encoder read them with --pretrained {FEATURES}",
            )
        return torch.full((len(texts),), row)

    def encode_text(self, rows: Tensor) -> Tensor:
        """Return a class as it is judged, once for each of its prompts, float64 [T, D + 2]."""
        self.active.append(int(rows[0]))
        return torch.from_numpy(self.classes[rows.cpu().numpy()]).to(rows.device)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return images as they are judged, float64 [B, D + 2], of uint8 [B, H, W, 3].

        Raises `EdgeclipError` before the first class: a head is one of labels.
        """
        if not self.active:
            raise EdgeclipError(
                f"--pretrained '{AS_IT_SHIPS}'",
                "judges the head, and this task makes no class features",
                f"take --task zeroshot_classification without --load_clfs, or --pretrained"
                f" {FEATURES}",
            )
        features = self.bundle.encode_pixels(pixels.cpu().numpy())
        active = self.bundle.class_features[self.active]
        judged = np.zeros((len(features), self.classes.shape[1]))
        judged[:, :-2] = sharpened(features, active, self.bundle.head)
        judged[:, -2] = 1.0
        return torch.from_numpy(judged).to(pixels.device)


class PlainFeatures:
    """A bundle's two encoders without its labels and head, called as CLIP_benchmark calls a model.

    Each raises `EdgeclipError` as its namesake of `Bundle` does.
    """

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.texts: list[str] = []
        """those whose ids come next"""

    def eval(self) -> None:
        """Do nothing: a bundle has no other mode."""

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return token ids [T, L]."""
        self.texts = texts
        return torch.from_numpy(self.bundle.token_ids(texts))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return unit rows [T, D] of token ids [T, L]."""
        rows = self.bundle.encode_ids(ids.cpu().numpy(), self.texts)
        return torch.from_numpy(rows).to(ids.device)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return unit rows [B, D] of uint8 [B, H, W, 3]."""
        return torch.from_numpy(self.bundle.encode_pixels(pixels.cpu().numpy())).to(pixels.device)


def extended(class_features: np.ndarray, offsets: np.ndarray | float) -> np.ndarray:
    """Return class features [N, D] with their offsets [N] and what gives all rows one norm.

    float64 [N, D + 2]: w_i, -o_i, sqrt(R^2 - |w_i|^2 - o_i^2).
    """
    classes = np.zeros((len(class_features), class_features.shape[1] + 2))
    classes[:, :-2] = class_features
    classes[:, -2] = -np.asarray(offsets)
    squares = (classes**2).sum(axis=1)
    classes[:, -1] = np.sqrt(squares.max() - squares)
    return classes


def load(
    model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[Any, Any, Any]:
    """Return model, transform and tokenizer of the bundle at `model_name`, as CLIP_benchmark asks.

    pretrained: one of PRETRAINED. cache_dir and device are for others: the bundle is a folder and
    names its runtime. Raises `EdgeclipError` for what is no bundle, and another `pretrained`.
    """
    if pretrained not in PRETRAINED:
        raise EdgeclipError(
            f"--pretrained {pretrained}",
            "is no word for a bundle, which has its weights in it",
            f"give --pretrained '{AS_IT_SHIPS}', or --pretrained {FEATURES}",
        )
    bundle = Bundle.load(model_name, check=True)
    model: ShippedHead | PlainFeatures = PlainFeatures(bundle)
    if pretrained == AS_IT_SHIPS:
        model = ShippedHead(bundle)
    return model, functools.partial(transform, spec=bundle.preprocess), model.tokenize


def transform(image: Image.Image, spec: Preprocess) -> Tensor:
    """Return uint8 [H, W, 3] of the encoder's size: a function of a module, since workers import
    it."""
    return torch.from_numpy(np.array(to_pixels(image, spec)))


def main() -> None:
    """Run CLIP_benchmark's `main` on this command line; a user's mistake is one line, exit code 1.

    Every other model type is CLIP_benchmark's, as without us.
    """
    try:
        cli = _judge()
        _, options = cli.get_parser_args()
        if getattr(options, "model_type", None) == MODEL_TYPE:
            _refuse_numpy()
            sys.argv += _output(options)
        cli.main()
    except EdgeclipError as e:
        sys.exit(f"Error: {' '.join(str(e).split())}")
    except FileNotFoundError as e:
        if e.filename is None:
            raise
        sys.exit(f"Error: {e.filename}: there is no such file; check --dataset_root and --split")


def _judge() -> ModuleType:
    """Return CLIP_benchmark's command line, with MODEL_TYPE among its model types."""
    try:
        from clip_benchmark import cli, models
    except ModuleNotFoundError as e:
        raise EdgeclipError(
            "edgeclip.clip_benchmark", f"{e.name} is not installed", INSTALL
        ) from None
    models.TYPE2FUNC[MODEL_TYPE] = load
    models.MODEL_TYPES.append(MODEL_TYPE)
    return cli


def _refuse_numpy() -> None:
    """Raise `EdgeclipError` where its last step would fail: 1.6.2 does with NumPy 2.4."""
    from clip_benchmark.metrics.zeroshot_classification import accuracy

    try:
        accuracy(torch.eye(2), torch.arange(2))
    except TypeError as e:
        raise EdgeclipError(
            "clip_benchmark", f"cannot count with NumPy {np.__version__} ({e})", INSTALL
        ) from None


def _output(options: Namespace) -> list[str]:
    """Return the --output that has the bundle's path as a name, where it is part of the file's.

    Raises `EdgeclipError` for several bundles.
    """
    if options.pretrained_model:
        raise EdgeclipError(
            "--pretrained_model", "is for models of others", "give --model and --pretrained"
        )
    if len(options.model) > 1:
        raise EdgeclipError("--model", "names several bundles", "give one a command")
    name = re.sub(r"[^\w.-]+", "_", options.model[0]).strip("_")
    return ["--output", options.output.replace("{model}", name)]

"""Teachers of whom only the answers are at hand: embeddings in clip-retrieval's layout, or
reinforced shards.

They have no tower, so they are not scored beside the student. Class features come from the recipe's
text encoder or from a file; where there is neither, what needs them is refused by name.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from edgeclip import disk
from edgeclip.device import finite
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import embeddings, reinforced
from edgeclip.host.teachers import Teacher, TextTower, open_clip
from edgeclip.host.towers import weights


def load(spec: R.Embeddings | R.Reinforced) -> Teacher:
    """Return a teacher whose rows are ready.

    Raises `EdgeclipError` where the text encoder, the class file and the rows are not of one width,
    or a file is missing.
    """
    if isinstance(spec, R.Embeddings):
        folder = embeddings.open_embeddings(Path(spec.root))
        width, identity, size = int(folder.images.shape[1]), embeddings.identity(spec), 224
        if folder.texts is not None and folder.texts.shape[1] != width:
            raise EdgeclipError(
                spec.root,
                f"its text_emb rows are {folder.texts.shape[1]} wide and its img_emb rows {width}",
                "give one model's embeddings",
            )
    else:
        width, identity, size = reinforced.width(spec), reinforced.identity(spec), spec.image_size
    text = open_clip.load(spec.text) if spec.text else None
    if text is not None and text.embed_dim != width:
        raise EdgeclipError(
            "teacher.text",
            f"its features are {text.embed_dim} wide and the embeddings {width}",
            "name the text encoder of the same model",
        )

    class_features = _class_file(Path(spec.class_features), width) if spec.class_features else None

    def no_text(texts: list[str]) -> Float[Tensor, "N D"]:
        raise EdgeclipError(
            "teacher.text", f"is null, and a text encoder is needed for '{texts[0]}'", "name one"
        )

    name = f"{Path(spec.root).name} (embeddings of others)"
    return Teacher(
        name=name,
        license=spec.license,
        identity=identity
        | ({"text": text.identity} if text else {})
        | ({"class_features": weights.source(spec.class_features)} if spec.class_features else {}),
        preprocess=Preprocess(size=size, mean=(0.0,) * 3, std=(1.0,) * 3),
        logit_scale=spec.logit_scale,
        embed_dim=width,
        tower=None,
        features=lambda rows: rows,
        encode_text=text.encode_text if text else no_text,
        text=text.text if text else None,
        source=spec,
        class_features=class_features,
    )


def _class_file(path: Path, width: int) -> np.ndarray:
    """[N, D] float32, unit."""
    try:
        features = disk.read_array(path)
    except FileNotFoundError:
        raise EdgeclipError(
            path, "there is no such file", "check the recipe's teacher.class_features"
        ) from None
    except (OSError, EOFError, ValueError) as e:
        raise EdgeclipError(
            path,
            f"is no readable .npy file ({e})",
            "write [classes, width] float rows with numpy.save",
        ) from None
    do = "write a row a class, of the embeddings' model"
    if features.ndim != 2 or features.shape[1] != width or features.dtype.kind != "f":
        what = f"holds {features.dtype} {features.shape}, not rows of width {width}"
        raise EdgeclipError(path, what, do)
    finite.features(features, path, do)
    unit: np.ndarray = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit.astype(np.float32)


def load_text(spec: R.Embeddings | R.Reinforced) -> TextTower:
    if spec.text is None:
        raise EdgeclipError(
            "teacher.text",
            "is null, so there is no text encoder to ship",
            "name one, or set text_encoder: false",
        )
    return open_clip.load_text(spec.text)

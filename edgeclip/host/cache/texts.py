"""Compute a teacher's text features: of captions and of class names."""

import math

import numpy as np
import torch

from edgeclip.device import finite, tokenizer
from edgeclip.device.zero_shot import ensemble, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host.teachers import Teacher
from edgeclip.progress import track

BATCH = 256


def caption_features(teacher: Teacher, captions: list[str]) -> np.ndarray:
    """Return [n, D] float16, unit rows.

    A caption that is longer than the text tower's context loses its end, as in CLIP's own training.
    """
    text = teacher.text
    if text is None:
        return _checked(teacher, teacher.encode_text(captions).numpy()).astype(np.float16)
    words = text.words()
    device = next(text.module.parameters()).device
    out = []
    starts = range(0, len(captions), BATCH)
    for start in track(starts, "captions", math.ceil(len(captions) / BATCH)):
        part = captions[start : start + BATCH]
        ids = tokenizer.encode(words, part, truncate=True)
        features = text.module(torch.from_numpy(ids).to(device))
        out.append(_checked(teacher, features.cpu().numpy()).astype(np.float16))
    return np.concatenate(out)


def _checked(teacher: Teacher, features: np.ndarray) -> np.ndarray:
    """Return features [n, D]. Raises `EdgeclipError` for a row that is not finite or all zeros."""
    return finite.features(
        features,
        f"text features of {teacher.name}",
        "check the teacher's weights: it does not compute numbers",
    )


def class_features(teacher: Teacher, classes: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """Return [N, D] unit class features: the prompt ensemble of each class name.

    A teacher that has class features alone gives those. Raises `EdgeclipError` where they are not
    as many as the classes, and for features that are not finite.
    """
    if not classes:
        return np.zeros((0, teacher.embed_dim), np.float32)
    known = teacher.class_features
    if known is None:
        features = _checked(teacher, teacher.encode_text(prompts(classes, templates)).numpy())
        return ensemble(features.reshape(len(classes), len(templates), -1))
    if len(known) != len(classes):
        raise EdgeclipError(
            "teacher.class_features",
            f"has {len(known)} rows, and there are {len(classes)} classes",
            "write a row a class",
        )
    return known

"""Bundles that are wrong, with a manifest that says nothing of it: what a wrong export would have
written.
"""

import numpy as np

from edgeclip import disk
from tests.support.optional import require


def resign(folder, **changes):
    """The same bundle with another manifest, hashes made anew: what a wrong export would have
    written.
    """
    content = {
        k: v for k, v in disk.read_manifest(folder, "bundle").items() if k not in ("kind", "files")
    }
    disk.write_manifest(folder, "bundle", content | changes)


def damage(folder, amount, seed=0):
    """Noise of `amount` times its own spread on every float weight."""
    onnx = require("onnx", "pip install 'edgeclip[train]'")

    model = onnx.load(folder / "image_encoder.onnx")
    rng = np.random.default_rng(seed)
    for initializer in model.graph.initializer:
        value = onnx.numpy_helper.to_array(initializer)
        if value.dtype == np.float32 and value.ndim > 1:
            noisy = value + amount * value.std() * rng.normal(size=value.shape).astype(np.float32)
            initializer.CopyFrom(
                onnx.numpy_helper.from_array(noisy.astype(np.float32), initializer.name)
            )
    onnx.save(model, folder / "image_encoder.onnx")
    resign(folder)
    return folder


def shuffle(folder, seed=0):
    """Every weight somewhere else in its tensor, rounded ones included."""
    onnx = require("onnx", "pip install 'edgeclip[train]'")

    model = onnx.load(folder / "image_encoder.onnx")
    rng = np.random.default_rng(seed)
    for initializer in model.graph.initializer:
        value = onnx.numpy_helper.to_array(initializer)
        if value.ndim > 1:
            moved = rng.permutation(value.ravel()).reshape(value.shape)
            initializer.CopyFrom(onnx.numpy_helper.from_array(moved, initializer.name))
    onnx.save(model, folder / "image_encoder.onnx")
    resign(folder)
    return folder

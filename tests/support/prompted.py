"""A CLIP small enough to train its prompts, and images for it."""

import random

import torch

from edgeclip.device.images import ImageRef
from edgeclip.host import recipe as R
from tests.support.images import encoded
from tests.support.toy_bundle import SIZE

VISION = {"image_size": SIZE, "layers": 3, "width": 24, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 20, "heads": 2, "layers": 3}
TINY = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
TEACHER = R.OpenClip(model="tiny", weights="random", config=TINY)
PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def images_of(folder, count, classes, draw, seed=0):
    """`count` labeled PNGs that `draw` makes of a class and a random generator, the classes in
    turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    images = [
        ImageRef(
            key=f"{folder.name}/{i}", path=str(folder / f"{i}.png"), label=classes[i % len(classes)]
        )
        for i in range(count)
    ]
    for p in images:
        with open(p.path, "wb") as f:
            f.write(encoded(draw(p.label, rng)))
    return images


def onnx_run(model, x):
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]

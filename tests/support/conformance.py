"""A conformance pack of a few images and strings, whose reference is the toy bundle's own
answers.
"""

import json
from pathlib import Path

import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import (
    KIND,
    LEVELS,
    REFERENCE,
    Answers,
    MadeFor,
    Pack,
    PackedImage,
    PackedText,
    PackManifest,
    describe,
    load_pack,
    put_answers,
    without_padding,
)
from edgeclip.device.preprocess import normalize
from tests.support.images import encoded, toy_image, truncated_jpeg

IMAGES = ["rgb", "rgb", "grey", "alpha"]
TEXTS = {"plain": "a cat", "capitals": "A CAT", "slang": "a \U0001f600 car"}


def toy_pack(folder: Path, bundle: Bundle, broken: bool = False) -> Pack:
    """Write the pack. broken: with a JPEG of kind "broken" that ends in its middle, and a string
    that is too long.
    """
    (folder / "images").mkdir(parents=True)
    images, answers = [], Answers({}, {}, {})
    for i, kind in enumerate(IMAGES):
        image = toy_image(i, 50 + i, 40)
        if kind == "grey":
            image = image.convert("L")
        name = f"{kind}-{i}"
        (folder / "images" / f"{name}.png").write_bytes(encoded(image))
        images.append(PackedImage(name, kind, f"images/{name}.png"))
        answers.images[name] = bundle.pixels(image)
    texts = [PackedText(f"{kind}-text", kind, text) for kind, text in TEXTS.items()]
    for text in texts:
        answers.ids[text.name] = without_padding(bundle.token_ids([text.text])[0].tolist())
    if broken:
        truncated_jpeg(folder / "images" / "half.jpg")
        images.append(PackedImage("half", "broken", "images/half.jpg"))
        texts.append(PackedText("long", "over-long", "a cat " * 40))
        answers.images["half"] = answers.images["rgb-0"]
        answers.ids["long"] = [2, 3]

    put_answers(folder / REFERENCE, answers)
    every = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (1, 1, 256, 3))
    levels = normalize(every, bundle.preprocess)[0, :, 0].T
    disk.write_array(folder / LEVELS, np.ascontiguousarray(levels))
    length = bundle.manifest.text.context_length
    manifest = PackManifest(
        made_for=MadeFor(bundle.preprocess, "toy", length),
        versions={"toy": "1"},
        images=images,
        texts=texts,
    )
    disk.write_manifest(folder, KIND, describe(manifest))
    return load_pack(folder)


def with_another_tokenizer(folder: Path, change) -> Bundle:
    """The bundle at `folder` after `change(tokenizer.json's value)`, with its hash in the
    manifest.
    """
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    manifest = disk.read_json(folder / disk.MANIFEST)
    manifest["files"]["tokenizer.json"] = disk.sha256(path)
    disk.write_json(folder / disk.MANIFEST, manifest)
    return Bundle.load(folder, check=True)

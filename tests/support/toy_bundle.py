"""A tiny student, its text tower and target, and the evaluation folder that a run would keep."""

import tarfile
from pathlib import Path

import numpy as np

from tests.support.images import add_member, encoded, toy_image

LABELS = ["cat", "dog", "car", "tree", "house", "apple"]
SIZE, WIDTH = 32, 16


def torch_student():
    """A small convolutional Student with batch norms whose statistics are not the initial ones."""
    import torch
    from torch import nn

    from edgeclip.host.student import Student

    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU6(),
        ]
    student = Student(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32, WIDTH, 24)
    student.train()
    with torch.no_grad():
        for step in range(30):
            student(torch.from_numpy(np.stack([toy_input(100 * step + i) for i in range(8)])))
    return student.eval()


def toy_input(seed: int) -> np.ndarray:
    return ((np.asarray(toy_image(seed, SIZE, SIZE), np.float32) / 255 - 0.5) / 0.25).transpose(
        2, 0, 1
    )


def toy_text():
    """A text tower of one embedding table over a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from torch import nn
    from torch.nn import functional as F

    from edgeclip.host.teachers import TextTower

    words = sorted(
        {
            w.lower()
            for t in [
                "a photo of red umbrella the letter two people shaking hands",
                *LABELS,
                "pear",
                "plum",
            ]
            for w in t.split()
        }
    )
    tokenizer = Tokenizer(
        models.WordLevel(
            {"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(words)}}, unk_token="[UNK]"
        )
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.table = nn.Embedding(len(words) + 2, 24)
            self.out = nn.Linear(24, WIDTH)

        def forward(self, input_ids):
            mask = (input_ids != 0).float()[:, :, None]
            return F.normalize(
                self.out((self.table(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)), dim=-1
            )

    return TextTower(module=Mean().eval(), tokenizer=tokenizer.to_str(), context_length=12)


def export_tiny_clip(folder: Path) -> None:
    """Write the fp32 bundle of a tiny open_clip model with random weights and CLIP's tokenizer."""
    import torch

    from edgeclip import disk
    from edgeclip.host.export import export
    from edgeclip.host.export.source import from_model

    vision = {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = folder.parent / "tiny-clip.json"
    disk.write_json(config, {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text})
    torch.manual_seed(0)
    source = from_model(str(config), "random", LABELS, None)
    export(source, "onnx-fp32", toy_target("onnx-fp32"), folder)


def toy_target(name: str):
    """The shipped target of that name, with the calibration of a toy."""
    import msgspec

    from edgeclip.device import target

    loaded = target.load(name)[1]
    small = {
        "images": 32,
        "judged_on": 0,
        "probe_layers": 2,
        "layer_cosine": 0.9,
        "methods": ("minmax",),
        "smoothing": (None,),
    }
    spec = target.Calibration(**small, min_int8_share=0, min_speedup=0)
    return msgspec.structs.replace(loaded, calibration=spec) if loaded.calibration else loaded


def write_evaluation(folder: Path, source, count: int, size: int = SIZE) -> Path:
    """An evaluation folder as `distill` leaves it; the labels are the student's own answers, every
    fifth one wrong.

    size: of the images, px. The teacher is right wherever the student is, and nowhere else.
    """
    import msgspec
    import torch

    from edgeclip import disk
    from edgeclip.device.preprocess import fingerprint, normalize, to_pixels
    from edgeclip.device.zero_shot import class_scores

    images = [toy_image(5000 + i, size, size) for i in range(count)]
    pixels = np.stack([to_pixels(image, source.preprocess) for image in images])
    with torch.inference_mode():
        x = torch.from_numpy(normalize(pixels, source.preprocess))
        features = source.image_encoder(x).numpy()
    answers = class_scores(features, source.class_features, source.head).argmax(axis=1)
    labels = [int((a + (i % 5 == 0)) % len(LABELS)) for i, a in enumerate(answers)]
    folder.mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i, p in enumerate(images):
            add_member(tar, f"{i:06d}.png", encoded(p))
    np.save(folder / "image_features.npy", features)
    np.save(folder / "teacher_features.npy", features)
    sets = [
        {
            "name": "all",
            "note": "made up",
            "role": "unseen",
            "compared": True,
            "rows": list(range(count)),
            "classes": list(range(len(LABELS))),
        }
    ]
    record = {
        "labels": labels,
        "class_names": LABELS,
        "sets": sets,
        "preprocess": msgspec.to_builtins(source.preprocess),
        "pixels": [fingerprint(p) for p in pixels],
        "teacher": [int(a) for a in answers],
    }
    disk.write_json(folder / "evaluation.json", record)
    disk.write_manifest(folder, "evaluation", {"license": "made up", "images": count})
    return folder

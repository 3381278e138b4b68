"""What fuzz.py feeds: for each kind of file that a stranger gives, the door that reads it and files
that it takes.

A target takes bytes and raises nothing but `EdgeclipError` (or `UnreadableImage`, which is one).
"""

import functools
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parent.parent
Feed = Callable[[bytes], None]


class Target(NamedTuple):
    make: Callable[[Path], Feed]
    """a folder for one file to what is fed"""
    seeds: Callable[[], list[bytes]]
    longest: int = 2**16
    """bytes of an input"""


# --- images


def _images(folder: Path) -> Feed:
    from edgeclip.device.preprocess import Preprocess, open_image, open_scaled, to_pixels

    half = (0.5, 0.5, 0.5)
    plain = Preprocess(size=32, mean=half, std=half)
    options = Preprocess(size=32, mean=half, std=half, exif=True, background=(1, 2, 3))

    def feed(content: bytes) -> None:
        assert to_pixels(open_image(content, "x"), plain).shape == (32, 32, 3)
        scaled, _ = open_scaled(content, "x", options, lambda full: (8, 8))
        assert to_pixels(scaled, plain).shape == (32, 32, 3)

    return feed


def _image_files() -> list[bytes]:
    from PIL import Image

    from edgeclip.device.image_file import FORMATS

    rng = np.random.default_rng(0)
    found = []
    for mode, bands in (("RGB", 3), ("L", 1), ("RGBA", 4), ("CMYK", 4), ("P", 1), ("1", 1)):
        pixels = rng.integers(0, 256, (16, 24, bands), np.uint8)
        image = Image.frombytes("L" if mode == "1" else mode, (24, 16), pixels.tobytes())
        if mode == "P":
            image.putpalette(bytes(range(256)) * 3)
        if mode == "1":
            image = image.convert("1")
        for kind in FORMATS:
            out = io.BytesIO()
            try:
                image.save(out, kind)
            except (OSError, KeyError, ValueError):
                continue  # a pair that this format does not have
            found.append(out.getvalue())
    return found


# --- shards


def _tar(folder: Path) -> Feed:
    from edgeclip.device.images import index_tar, read

    path = folder / "0.tar"

    def feed(content: bytes) -> None:
        path.write_bytes(content)
        for image in index_tar(path):
            assert len(read(image)) == image.size
            image.key.encode()

    return feed


def _tars() -> list[bytes]:
    found = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for name in ("a.png", "a.cls", "a.txt", "d" * 120 + "/b.jpg", "ä.webp"):
                member = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[-30:])
                member.size = 2
                member.pax_headers = {"comment": "c"}
                tar.addfile(member, io.BytesIO(b"7\n"))
            link = tarfile.TarInfo("l.png")
            link.type, link.linkname = tarfile.SYMTYPE, "a.png"
            tar.addfile(link)
        found.append(out.getvalue()[:-8192])  # a record is padded to 10 KiB
    return found


# --- YAML and JSON


def _yaml(folder: Path) -> Feed:
    from edgeclip import config, text_file
    from edgeclip.device.profile import Device
    from edgeclip.device.target import Target as ExportTarget
    from edgeclip.errors import EdgeclipError
    from edgeclip.host.recipe import Recipe
    from edgeclip.text_file.parser import compose_yaml, parse_yaml

    def feed(content: bytes) -> None:
        text = text_file.decode(content, "x")
        compose_yaml(text, "x")
        value = parse_yaml(text, "x")
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        for kind in (Device, ExportTarget, Recipe):
            try:
                config.convert(value, kind, "x")
            except EdgeclipError:
                continue

    return feed


def _yamls() -> list[bytes]:
    paths = [p for name in ("recipes", "export", "devices") for p in (REPO / name).glob("*.yaml")]
    return [path.read_bytes() for path in sorted(paths)]


def _json(folder: Path) -> Feed:
    from edgeclip import disk
    from edgeclip.device.bench_report import BenchReport
    from edgeclip.device.records import ParityReport, SelftestReport
    from edgeclip.errors import EdgeclipError
    from edgeclip.text_file.parser import parse_json

    def feed(content: bytes) -> None:
        value = parse_json(content, "x")
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        for kind in (ParityReport, BenchReport, SelftestReport):
            try:
                disk.from_json(value, kind, "x")
            except EdgeclipError:
                continue

    return feed


def _jsons() -> list[bytes]:
    found = [
        b'{"format": 2, "verdict": "holds", "rules": [], "target": "t", "a": [1, -2.5e3, null]}'
    ]
    found.append(b'{"\\u00e4": "\\ud83d\\ude00", "deep": [[[{}]]], "big": 18446744073709551615}')
    for path in sorted((REPO / "results").glob("*.jsonl")):
        found.append(path.read_bytes().splitlines()[0])
    return found


# --- arrays and weights


def _npy(folder: Path) -> Feed:
    from edgeclip.device import conformance

    path = folder / "x.npy"

    def feed(content: bytes) -> None:
        path.write_bytes(content)
        conformance._tensor(path, 4)

    return feed


def _npys() -> list[bytes]:
    found = []
    for array in (
        np.zeros((3, 4, 4), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.asfortranarray(np.ones((2, 3), ">f8")),
        np.zeros(0, np.float16),
        np.zeros(2, [("a", "<u4"), ("b", "S3", (2,))]),
    ):
        for version in ((1, 0), (2, 0), (3, 0)):
            out = io.BytesIO()
            np.lib.format.write_array(out, array, version)
            found.append(out.getvalue())
    return found


def _safetensors(folder: Path) -> Feed:
    from edgeclip.host.towers import checkpoint

    path = folder / "x.safetensors"

    def feed(content: bytes) -> None:
        path.write_bytes(content)
        checkpoint.read(str(path))

    return feed


def _safetensors_files() -> list[bytes]:
    import torch
    from safetensors.torch import save

    half = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}
    out = io.BytesIO()
    torch.save({"state_dict": half, "epoch": 3}, out)
    return [save(half), save({"module.c": torch.ones(1).half()}, {"format": "pt"}), out.getvalue()]


def _onnx(folder: Path) -> Feed:
    from edgeclip.device.runtime.onnxruntime import open_session

    path = folder / "x.onnx"

    def feed(content: bytes) -> None:
        path.write_bytes(content)
        open_session(path, 1, "all")

    return feed


def _onnx_files() -> list[bytes]:
    from onnx import TensorProto, helper, numpy_helper

    found = []
    for kind, operation in (("FLOAT", "MatMul"), ("FLOAT16", "Add")):
        weight = np.ones((2, 2), np.float16 if kind == "FLOAT16" else np.float32)
        ends = [
            helper.make_tensor_value_info(name, getattr(TensorProto, kind), ["n", 2])
            for name in ("x", "y")
        ]
        node = helper.make_node(operation, ["x", "w"], ["y"])
        initializer = numpy_helper.from_array(weight, "w")
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], [initializer])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        found.append(model.SerializeToString())
    return found


# --- the rest


def _tokenizer(folder: Path) -> Feed:
    from edgeclip import text_file
    from edgeclip.device import tokenizer

    def feed(content: bytes) -> None:
        words = tokenizer.load(text_file.decode(content, "x"), 8)
        ids = tokenizer.encode(words, ["a photo of a cat", ""], truncate=True)
        assert ids.shape == (2, 8)

    return feed


def _tokenizers() -> list[bytes]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    level = Tokenizer(models.WordLevel({"a": 0, "photo": 1, "[UNK]": 2, "cat": 3}, "[UNK]"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    level.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    level.post_processor = processors.TemplateProcessing("a $0 cat", None, [("a", 0), ("cat", 3)])
    pairs = Tokenizer(
        models.BPE({"a": 0, "c": 1, "t": 2, "at": 3, "cat": 4}, [("a", "t"), ("c", "at")])
    )
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel()
    pairs.enable_padding(pad_id=2, length=8)
    pieces = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1, "##t": 2}, unk_token="[UNK]"))
    return [t.to_str().encode() for t in (level, pairs, pieces)]


def _meter(folder: Path) -> Feed:
    from edgeclip.device.power import meter

    path = folder / "meter.csv"

    def feed(content: bytes) -> None:
        path.write_bytes(content)
        for reading in meter(path):
            assert np.isfinite([reading.time, reading.watts]).all()

    return feed


def _meters() -> list[bytes]:
    return [
        b"timestamp,watts\n1700000000.5,4.25\n1700000001,nan\n",
        b"watts,timestamp,note\r\n4,2024-01-02T03:04:05Z,x\r\n5,2024-01-02T03:04:06+01:00,\r\n",
        '\ufefftimestamp,watts\n"1700000000","5"\n'.encode(),
    ]


TARGETS = {
    "images": Target(_images, _image_files),
    "tar": Target(_tar, _tars),
    "yaml": Target(_yaml, _yamls),
    "json": Target(_json, _jsons),
    "npy": Target(_npy, _npys, 4096),
    "safetensors": Target(_safetensors, _safetensors_files, 4096),
    "onnx": Target(_onnx, _onnx_files, 4096),
    "tokenizer": Target(_tokenizer, _tokenizers, 8192),
    "meter": Target(_meter, _meters, 4096),
}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of the file that a target reads; gone when this process ends."""
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(
        prefix="edgeclip-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    )


def mutated(content: bytes, rng: Any, others: list[bytes]) -> bytes:
    """Return an input near another one: bits, bytes, numbers, parts taken out, doubled or mixed."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(out) + 1)
        way = rng.randrange(7)
        if way == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            out[at : at + 1] = rng.randbytes(rng.randint(1, 4))
        elif way == 2:
            number = rng.choice([0, 1, 127, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63])
            size = rng.choice([2, 4, 8])
            order = rng.choice(["little", "big"])
            out[at : at + size] = (number % 256**size).to_bytes(size, order)
        elif way == 3:
            del out[at : at + rng.randint(1, 64)]
        elif way == 4:
            out[at:at] = out[at : at + rng.randint(1, 64)] * rng.choice([1, 1, 1, 200])
        elif way == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[at : at + 16] = other[start : start + rng.randint(1, 64)]
        else:
            digits = rng.choice([b"-1", b"1e999", b"nan", b"9" * 40, b"[" * 100, b"\0", b"\xff"])
            out[at:at] = digits
    return bytes(out)

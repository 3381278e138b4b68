"""What one field of a manifest or of a board's answer may hold: sizes, names and numbers.

A file from outside is a claim. msgspec compares each field with these when it is read, before
anything is allocated, opened or printed by it. A constraint is written so that a number that is
none fails it.
"""

from typing import Annotated

from msgspec import Meta

PART = r"[^/\\\x00-\x1f\x7f]+"
"""of a path: no separator of any system, no control character"""

Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=rf"\A(?!(?:.*/)?\.{{1,2}}(?:/|\Z)){PART}(?:/{PART})*\Z",
    ),
]
"""a plain relative path: it leads nowhere but below its folder"""
Word = Annotated[str, Meta(min_length=1, max_length=255, pattern=rf"\A(?!\.){PART}\Z")]
"""a name that becomes part of a file's: no folder, and not hidden"""
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""a sha256 in hex"""
Line = Annotated[str, Meta(max_length=1_000)]
Text = Annotated[str, Meta(max_length=20_000)]

Count = Annotated[int, Meta(ge=0, le=2**31)]
Bytes = Annotated[int, Meta(ge=0, le=2**50)]
Width = Annotated[int, Meta(ge=1, le=4_096)]
"""of features; the widest published model's is 3,200"""
Tokens = Annotated[int, Meta(ge=1, le=8_192)]
"""of a text"""
Finite = Annotated[float, Meta(ge=-1e12, le=1e12)]
Positive = Annotated[float, Meta(ge=0.0, le=1e12)]
"""a time, a size, a power: 0 or more"""
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Cosine = Annotated[float, Meta(ge=-1.001, le=1.001)]
"""of float32 rows, which are of unit length but for rounding"""
Difference = Annotated[float, Meta(ge=-1e3, le=1e3)]
"""of two scores"""
Scale = Annotated[float, Meta(gt=0.0, le=1e4)]
"""of logits; CLIP's own is at most 100"""

"""Looks into an ONNX file without onnx, which no board has: a protobuf is fields, each with its
number, and everything that is not asked for is stepped over."""

import io
from collections.abc import Iterator

VARINT = 0
"""a wire type of protobuf; so below"""
LENGTH = 2
FIXED = {1: 8, 5: 4}
"""to the bytes that a value takes"""


def fields(file: io.BufferedIOBase, end: int, wanted: int) -> Iterator[int]:
    """Yield the value of each field `wanted` of the protobuf message from here to `end`.

    Of a field with a length, where it ends, while the file is at its start. Everything else is
    stepped over, so that a model is looked through in a millisecond. What is no protobuf has no
    fields: the runtime says what is wrong with it.
    """
    at = file.tell()
    while at < end:
        start = at
        file.seek(start)
        key = _varint(file)
        kind = key & 7
        if kind == LENGTH:
            length = _varint(file)
            value = at = file.tell() + length
        elif kind == VARINT:
            value = _varint(file)
            at = file.tell()
        elif kind in FIXED:
            value = at = file.tell() + FIXED[kind]
        else:
            return
        if not start < at <= end:  # a damaged length; the end of the file goes no further
            return
        if key >> 3 == wanted:
            yield value


def _varint(file: io.BufferedIOBase) -> int:
    value = shift = 0
    while shift < 70 and (
        byte := file.read(1)
    ):  # protobuf's longest has ten bytes  # protobuf's longest has ten bytes
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
    return value

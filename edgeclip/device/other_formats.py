"""Say what a file is that Pillow cannot identify: what phones, browsers and designers write."""

from pathlib import Path

HEAD = 256
"""bytes that tell"""
CONVERT = "convert it to JPEG or PNG"
HEIC = "a HEIC photo, which Pillow does not read"
BOXES = {b"heic": HEIC, b"heix": HEIC, b"heim": HEIC, b"heis": HEIC, b"hevc": HEIC, b"hevx": HEIC}
BOXES |= {b"mif1": HEIC, b"msf1": HEIC, b"avif": "an AVIF image that this Pillow cannot read"}
"""brand of an ISO file, its bytes 8 to 12; a film has any other"""
MAGIC = {
    b"%PDF": ("a PDF document", "take the images out of it"),
    b"\xff\x0a": ("a JPEG XL image, which Pillow does not read", CONVERT),
    b"\x00\x00\x00\x0cJXL ": ("a JPEG XL image, which Pillow does not read", CONVERT),
    b"\x1aE\xdf\xa3": ("a film", "take the images out of it"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it"),
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"),
}


def named(source: Path | bytes) -> tuple[str, str] | None:
    """Return (what a file is, what to do), of its bytes or its path; None: nobody knows."""
    head = source[:HEAD] if isinstance(source, bytes) else _head(source)
    if not head:
        return "an empty file", "replace or remove it"
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            return found
    if head[4:8] == b"ftyp":
        film = ("a film", "take the images out of it")
        return (BOXES[head[8:12]], CONVERT) if head[8:12] in BOXES else film
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page that a server sent in place of the image", "download it again"
    if text.startswith((b"<svg", b"<?xml")):
        return "a drawing (SVG) and no pixels", CONVERT
    return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)

"""What a stranger's shard can ask for, and what its headers can say of its bytes: each is a counted
skip with its cause, or one line that names the shard.
"""

import collections
import io
import random
import tarfile

import numpy as np
import pytest

from edgeclip.device import tar_file
from edgeclip.device.images import (
    MAX_CAPTION,
    MAX_CAUSES,
    MAX_LABEL,
    ImageRef,
    index_tar,
    read,
)
from edgeclip.device.tar_file import MAX_HEADER, MAX_HEADERS, members
from edgeclip.errors import EdgeclipError
from tests.support.images import add_member, encoded, toy_image

PNG = encoded(toy_image(0))
END = bytes(2 * tarfile.BLOCKSIZE)


def header(name, size=0, kind=tarfile.REGTYPE, **fields):
    """One member's header in the format of GNU, whatever it says."""
    info = tarfile.TarInfo(name)
    info.size, info.type = max(size, 0), kind
    for key, value in fields.items():
        setattr(info, key, value)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-tarfile.BLOCKSIZE :])
    if size < 0:
        block[124:136] = (2**96 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def file(name, content, **fields):
    return header(name, len(content), **fields) + padded(content)


def pax(kind=tarfile.XHDTYPE, **fields):
    """A header of pax fields; `__` in a name is a dot."""
    body = b""
    for key, value in fields.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + len(str(len(line) + 4))
        body += str(length).encode() + line
    return file("pax", body, kind=kind)


def shard(tmp_path, *parts, end=END):
    path = tmp_path / "0.tar"
    path.write_bytes(b"".join(parts) + end)
    return path


def indexed(path):
    """The images by their keys, and what was skipped."""
    skipped = collections.Counter()
    images = index_tar(path, skipped)
    return {image.key: read(image) for image in images}, dict(skipped)


REFUSED = "with a link, a device or a sparse file in place of an image"
GOOD = file("good.png", PNG)


@pytest.mark.parametrize(
    "fields",
    [
        {"GNU__sparse__size": 4096, "GNU__sparse__numblocks": 0},
        {"GNU__sparse__size": 4096, "GNU__sparse__offset": 0, "GNU__sparse__numbytes": 4},
        {"GNU__sparse__map": "0,512", "GNU__sparse__size": 4096},
        {"GNU__sparse__major": 1, "GNU__sparse__minor": 0, "GNU__sparse__realsize": 2**40},
        {"GNU__sparse__major": 9, "GNU__sparse__minor": 0},
        {"GNU__sparse__realsize": 2**40},
        {"SCHILY__realsize": 4096},
        {"SUN__holesdata": " 0 4096"},
    ],
    ids=lambda f: " ".join(f),
)
def test_a_sparse_member_of_pax_is_counted_and_the_next_is_read(tmp_path, fields):
    path = shard(tmp_path, pax(**fields), file("a.png", b"map\n" * 200), GOOD)
    assert indexed(path) == ({"0/good": PNG}, {REFUSED: 1})


def test_a_sparse_member_that_gnu_tar_wrote_is_refused_with_the_shards_name(tmp_path):
    path = shard(tmp_path, header("a.png", 512, tarfile.GNUTYPE_SPARSE), bytes(512), GOOD)
    with pytest.raises(EdgeclipError, match=r"0\.tar: .* sparse member; make it without --sparse"):
        index_tar(path)


@pytest.mark.parametrize("size", [2**40, 4096, 0])
def test_a_size_for_all_members_is_none_of_an_image(tmp_path, size):
    """A global header of pax may give each member another size than the one it is stored with."""
    path = shard(tmp_path, pax(tarfile.XGLTYPE, size=size), GOOD)
    assert indexed(path) == ({}, {REFUSED: 1})


LONG = file("././@LongLink", b"x.png\0", kind=tarfile.GNUTYPE_LONGNAME)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([LONG] * 3000 + [GOOD], f"more than {MAX_HEADERS} headers"),
        ([pax(comment="x")] * 3000 + [GOOD], f"more than {MAX_HEADERS} headers"),
        ([pax(tarfile.XGLTYPE, comment="x")] * 3000, f"more than {MAX_HEADERS} headers"),
        (
            [header("@", MAX_HEADER + 1, tarfile.GNUTYPE_LONGNAME)],
            f"more than {MAX_HEADER:,} bytes",
        ),
        ([header("@", 20 * 2**30, tarfile.XHDTYPE)], f"more than {MAX_HEADER:,} bytes"),
        ([header("@", -512, tarfile.XHDTYPE)], f"more than {MAX_HEADER:,} bytes"),
        ([GOOD, header("a.png", -1024)], "cut off, or is damaged"),
        ([GOOD, header("a.png", 2**70)], "cut off, or is damaged"),
        ([GOOD, header("a.png", 2**33)], "cut off, or is damaged"),
        ([GOOD, pax(size=-1024), file("a.png", PNG)], "cut off, or is damaged"),
        ([GOOD, pax(size="9" * 5000), file("a.png", PNG)], "not a readable"),
        ([GOOD, b"rubbish" * 200], "cut off, or is damaged"),
        ([GOOD, GOOD], "two members are called 'good.png'"),
        ([b"no tar at all" * 100], "not a readable"),
    ],
)
def test_headers_that_no_shard_needs_are_one_line(tmp_path, parts, says):
    path = shard(tmp_path, *parts)
    with pytest.raises(EdgeclipError) as e:
        index_tar(path)
    assert str(e.value).startswith(f"{path}: not a readable WebDataset shard")
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_as_many_headers_as_a_member_needs_are_read(tmp_path):
    name = "a" * 300 + "/" + "b" * 90 + ".png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(
            tmp_path / "0.tar", "w", format=form, pax_headers={"comment": "c"}
        ) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"LIBARCHIVE.xattr.user": "v" * 4000, "mtime": "1.5"}
            tar.addfile(info, io.BytesIO(PNG))
        assert indexed(tmp_path / "0.tar") == ({"0/" + name[:-4]: PNG}, {})


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (file("/etc/a.png", PNG), "with a path that leaves the shard (/ or ../ at its start)"),
        (file("../a.png", PNG), "with a path that leaves the shard (/ or ../ at its start)"),
        (file("b/../../a.png", PNG), "with a path that leaves the shard (/ or ../ at its start)"),
        (file("./../a.png", PNG), "with a path that leaves the shard (/ or ../ at its start)"),
        (file("a\x1b[2J.png", PNG), "with a control character in its name"),
        (file("a\nb.png", PNG), "with a control character in its name"),
        (pax(path="a\x07.png") + file("x", PNG), "with a control character in its name"),
        (file("\udcff.png", PNG), "with a name that is not UTF-8"),
        (file("README", b"x"), "without a suffix"),
        (header("a.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), REFUSED),
        (header("a.png", kind=tarfile.LNKTYPE, linkname="good.png"), REFUSED),
        (header("a.png", kind=tarfile.CHRTYPE), REFUSED),
        (header("a.png", kind=tarfile.BLKTYPE), REFUSED),
        (header("a.png", kind=tarfile.FIFOTYPE), REFUSED),
    ],
)
def test_a_name_or_a_kind_that_is_no_images_is_counted(tmp_path, part, cause):
    assert indexed(shard(tmp_path, GOOD, part)) == ({"0/good": PNG}, {cause: 1})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_text_that_is_no_file_is_counted_and_a_label_is_named(tmp_path, kind):
    loop = header("a.txt", kind=kind, linkname="a.txt")
    cause = "with a link, a device or a sparse file in place of a caption"
    path = shard(tmp_path, GOOD, file("a.png", PNG), loop)
    assert indexed(path) == ({"0/good": PNG}, {cause: 1})
    path = shard(tmp_path, GOOD, header("good.cls", kind=kind, linkname="good.cls"))
    with pytest.raises(EdgeclipError, match=r"0\.tar \(good\.cls\): a link, .* no class index"):
        index_tar(path)


def test_a_caption_of_20_gib_is_counted_and_not_read(tmp_path):
    path = shard(tmp_path, file("a.png", PNG), header("a.txt", 20 * 2**30), end=b"")
    with path.open("r+b") as out:
        out.seek(20 * 2**30, io.SEEK_END)
        out.write(GOOD + END)
    cause = f"with a caption of more than {MAX_CAPTION:,} bytes"
    assert indexed(path) == ({"0/good": PNG}, {cause: 1})


def test_a_caption_and_a_label_may_be_as_long_as_the_limits_say(tmp_path):
    caption = b"c" * MAX_CAPTION
    label = b"7".rjust(MAX_LABEL)
    path = shard(tmp_path, GOOD, file("good.txt", caption), file("good.cls", label))
    (image,) = index_tar(path)
    assert (image.caption, image.label) == (caption.decode(), 7)
    path = shard(tmp_path, GOOD, file("good.cls", label + b" "))
    with pytest.raises(EdgeclipError, match=r"good\.cls\): .*more than 256 bytes is no class"):
        index_tar(path)


@pytest.mark.parametrize("digits", ["9" * 10, "9" * 200, "9" * 4000, "٣", "0x7", "7.0", "1e3"])
def test_a_label_of_many_digits_is_named(tmp_path, digits):
    path = shard(tmp_path, GOOD, file("good.cls", digits.encode()))
    with pytest.raises(EdgeclipError, match=r"0\.tar \(good\.cls\): .* no class index") as e:
        index_tar(path)
    assert len(str(e.value)) < 300 + len(str(path))


def test_causes_are_as_many_as_a_reader_needs(tmp_path):
    path = shard(tmp_path, *[file(f"{i}.kind{i}", b"x") for i in range(3 * MAX_CAUSES)])
    images, skipped = indexed(path)
    assert images == {}
    assert len(skipped) <= MAX_CAUSES + 1
    assert sum(skipped.values()) == 3 * MAX_CAUSES


def honest():
    """A shard of each format that Python writes."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for i in range(3):
                add_member(tar, f"{'d' * 90}/{i}ä.png", PNG)
                add_member(tar, f"{'d' * 90}/{i}ä.cls", b"%d" % i)
                add_member(tar, f"{'d' * 90}/{i}ä.txt", "a caption, ä".encode())
        yield out.getvalue()


def test_mutations_are_images_of_the_file_or_one_line(tmp_path):
    rng = np.random.default_rng(random.Random("tar").randrange(2**32))
    shards = list(honest())
    path = tmp_path / "0.tar"
    refusals = 0
    for i in range(300):
        content = bytearray(shards[i % 3])
        for _ in range(rng.integers(1, 5)):
            block = 512 * int(rng.integers(0, len(content) // 512))
            at = block + int(rng.choice([0, 90, 100, 124, 135, 156, 157, 257, 345, 482]))
            content[at] = rng.integers(0, 256)
            if rng.random() < 0.8:  # a header whose sum is right again
                content[block + 148 : block + 156] = b" " * 8
                total = sum(content[block : block + 512])
                content[block + 148 : block + 156] = b"%06o\0 " % total
        path.write_bytes(content)
        try:
            for image in index_tar(path):
                assert 0 <= image.offset <= image.offset + image.size <= len(content)
                assert read(image) == bytes(content)[image.offset : image.offset + image.size]
                assert -1 <= image.label < 10**9
        except EdgeclipError as e:
            refusals += 1
            assert str(path) in str(e)
            assert "\n" not in str(e)
    assert 30 < refusals < 300


def test_every_shard_comes_through_one_door():
    import ast

    from tests.support.files import REPO

    found = set()
    for source in (REPO / "edgeclip").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("tarfile.open"):
                modes = [
                    ast.unparse(a) for a in [*node.args[1:], *[k.value for k in node.keywords]]
                ]
                if "'w'" not in modes:
                    found.add(str(source))
    assert found == set()
    assert issubclass(tar_file._Archive, tarfile.TarFile)


def test_a_member_says_where_it_lies(tmp_path):
    path = shard(tmp_path, header("d", kind=tarfile.DIRTYPE), GOOD)
    folder, image = members(path)
    assert folder.is_folder and not folder.is_file and image.is_file
    assert read(ImageRef("k", str(path), image.offset, image.size)) == PNG

"""Photos that are stored turned are told once, by their headers, and not where they are turned."""

import re
import tarfile

import pytest

from edgeclip import disk
from edgeclip.device.images import ImageRef, index_folder, index_tar
from edgeclip.device.manifest import read_manifest
from edgeclip.device.turned import say_turned
from edgeclip.errors import EdgeclipError
from tests.support import image_files as files
from tests.support.command import run
from tests.support.images import add_member, toy_image, truncated_jpeg

LINE = r"(\d+) of (\d+) images looked at are stored turned .* preprocess: \{exif: true\}"


def photos(folder, turned, upright):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(turned + upright):
        tag = 6 if i < turned else 1
        (content,) = files.turned(toy_image(i), tag, ("JPEG",)).values()
        (folder / f"{i}.jpg").write_bytes(content)
    return folder


def told(stderr):
    """The (turned, looked at) of each line that was said."""
    return [(int(a), int(b)) for a, b in re.findall(LINE, stderr)]


def test_several_sets_are_counted_in_one_line(tmp_path, capsys):
    sets = [index_folder(photos(tmp_path / "a", 3, 2)), index_folder(photos(tmp_path / "b", 1, 4))]
    say_turned(sets, exif=False)
    assert told(capsys.readouterr().err) == [(4, 10)]


def test_members_of_a_shard_are_looked_at_too(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(photos(tmp_path / "a", 2, 1).iterdir()):
            add_member(tar, path.name, path.read_bytes())
    say_turned([index_tar(tmp_path / "0.tar")], exif=False)
    assert told(capsys.readouterr().err) == [(2, 3)]


def test_nothing_is_said_where_none_is_turned_or_all_are_turned_back(tmp_path, capsys):
    say_turned([index_folder(photos(tmp_path / "a", 0, 3)), []], exif=False)
    say_turned([index_folder(photos(tmp_path / "b", 3, 0))], exif=True)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_is_not_looked_at(tmp_path, capsys):
    folder = photos(tmp_path / "a", 1, 1)
    (folder / "no image.jpg").write_bytes(b"nothing")
    say_turned([[*index_folder(folder), ImageRef("gone", "gone.jpg")]], exif=False)
    assert told(capsys.readouterr().err) == [(1, 2)]


def test_a_header_is_enough_and_a_tiff_is_turned_by_pillow_itself(tmp_path, capsys):
    truncated_jpeg(tmp_path / "half.jpg")
    for format, content in files.turned(toy_image(0), 6).items():
        (tmp_path / f"{format}.{format}").write_bytes(content[: len(content) * 3 // 4])
    names = ("half.jpg", "JPEG.JPEG", "PNG.PNG", "TIFF.TIFF")
    refs = [ImageRef(name, str(tmp_path / name)) for name in names]
    say_turned([refs], exif=False)
    assert told(capsys.readouterr().err) == [(2, 4)]


@pytest.mark.parametrize("verb", ["classify", "embed"])
def test_the_commands_of_a_bundle_say_it_once(verb, here, shipped_bundle):
    paths = sorted(photos(here / "a", 2, 1).iterdir())
    more = ("--out", "f.npy") if verb == "embed" else ()
    result = run(verb, *paths, "--bundle", shipped_bundle("onnx-fp32"), *more)
    assert result.exit_code == 0, result.output
    assert told(result.stderr) == [(2, 3)] and len(result.stderr.splitlines()) == 1


def test_init_says_it(here):
    pytest.importorskip("torch", reason="init is the host's")
    for name in ("cat", "dog"):
        photos(here / "pets" / name, 2, 3)
    result = run("init", "pets")
    assert result.exit_code == 0 and told(result.stderr) == [(4, 10)]


def test_a_manifest_from_before_the_options_has_them_off(own_bundle):
    folder = own_bundle("onnx-fp32")
    path = folder / disk.MANIFEST
    manifest = disk.read_json(path)
    del manifest["preprocess"]["exif"], manifest["preprocess"]["background"]
    disk.write_json(path, manifest)
    assert read_manifest(folder).preprocess.options() == []
    manifest["preprocess"] |= {"exif": True, "background": [1, 2, 3]}
    disk.write_json(path, manifest)
    found = read_manifest(folder).preprocess
    assert found.options() == ["exif", "background"] and found.background == (1, 2, 3)
    manifest["preprocess"]["background"] = [1, 2, 300]
    disk.write_json(path, manifest)
    with pytest.raises(EdgeclipError, match="background"):
        read_manifest(folder)

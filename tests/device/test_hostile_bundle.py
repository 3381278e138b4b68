"""A bundle is a claim of a stranger, whose hashes are right: every door refuses what is no bundle in
one line, or answers rightly; never a traceback, never more memory than a bundle needs.
"""

import io
import json
import os
import resource
import shutil
import zipfile

import msgspec
import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device.bench import images_of, stage_seconds
from edgeclip.device.bundle import Bundle, bake_labels
from edgeclip.device.machine import facts
from edgeclip.device.manifest import read_manifest
from edgeclip.device.validate import validate
from edgeclip.errors import EdgeclipError
from edgeclip.reports import provenance, targets
from tests.support.command import mistake
from tests.support.damage import resign
from tests.support.images import encoded, toy_image
from tests.support.optional import require
from tests.support.toy_bundle import toy_target

MOST = 200 << 20
"""bytes that one door may ask for"""
RAW = "raw JSON "
"""begins a value that is written as it is, where Python's JSON has no word for it"""
HOSTILE = [
    None,
    True,
    {"of": "another type"},
    [],
    -1,
    0,
    2**63,
    0.5,
    1e308,
    f"{RAW}NaN",
    f"{RAW}1e999",
    f"{RAW}{'9' * 5000}",
    "",
    "../x",
    "/etc/passwd",
    "a" * 100_000,
    "\x1b[31mred\n\x00\u202e",
    f"{RAW}{'[' * 100_000}{']' * 100_000}",
]
FILLED = {
    "class_offset": {
        "offset": 0.1,
        "labels": ["cat"],
        "images": 9,
        "rule": "midway",
        "labeled_named": 0.5,
        "others_named": 0.5,
        "labeled_named_without": 0.5,
        "others_named_without": 0.5,
    },
    "lint": {"checked_by": "a", "parses": True, "builds": None, "errors": ["one"]},
    "session_options": {"image_encoder.onnx": {"an option": "1"}},
}
"""fields that the toy leaves out"""


def unsealed(bundle):
    """A manifest's fields as a stranger writes them: a seal finds damage, and he leaves it out."""
    content = json.loads((bundle / disk.MANIFEST).read_text())
    content.pop("seal", None)
    return content


def places(value, at=()):
    """Every field's path, containers too; of a list and of a free mapping the first alone."""
    items = []
    if isinstance(value, dict):
        items = value.items()
        if at in (("files",), ("versions",), ("licenses",), ("parents",)):
            items = list(items)[:1]
    elif isinstance(value, list) and value:
        items = [(0, value[0])]
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def changed(content, place, value):
    """A copy of a manifest's text with another value at one place."""
    copy = json.loads(json.dumps(content))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    text = json.dumps(copy)
    if isinstance(value, str) and value.startswith(RAW):
        text = text.replace(json.dumps(value), value.removeprefix(RAW))
    return text


def within_memory(work):
    """Do the work where the kernel gives no more than MOST bytes besides."""
    with open("/proc/self/status") as f:
        (now,) = [int(line.split()[1]) << 10 for line in f if line.startswith("VmData")]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST, before[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def answered(bundle, of_a_run=lambda: None):
    """What every door gives: None where one of them refused in one line.

    of_a_run: further doors, those of a bundle in a run.
    """
    photo = encoded(toy_image(1))
    try:
        loaded = Bundle.load(bundle)
        ranked = loaded.classify(photo)
        assert {row["label"] for row in ranked} <= set(loaded.labels)
        assert 0.99 < sum(row["probability"] for row in loaded.classify(photo, top=99)) < 1.01
        rows = loaded.encode_image([photo])
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 0.02
        baked = loaded.bake(["pear", "plum"])
        assert np.isfinite(baked).all()
        report = validate(loaded, None, facts())
        for source in images_of(loaded, None):
            assert np.isfinite(stage_seconds(loaded, source)).all()
        of_a_run()
        return json.dumps(msgspec.to_builtins(report), allow_nan=False)
    except EdgeclipError as e:
        assert len(str(e).splitlines()) == 1, str(e)
        assert str(e).isprintable(), repr(str(e))
        assert len(str(e)) < 8_000, str(e)[:200]
        return None


def rewrite(bundle, name, content):
    """Another file in the bundle, with its right hash; content: bytes, or what writes a file."""
    if isinstance(content, bytes):
        (bundle / name).write_bytes(content)
    else:
        content(bundle / name)
    resign(bundle)
    return bundle


def npz(**members):
    """A .npz file of members: arrays, or raw bytes of a .npy file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, value in members.items():
            z.writestr(f"{name}.npy", value if isinstance(value, bytes) else npy(value))
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape, dtype="<f4", values=b""):
    """A .npy file that promises a shape and holds these values."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (118 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


@pytest.mark.parametrize("target", ["onnx-int8"])
def test_every_field_of_a_manifest_is_a_claim(shipped_bundle, source, tmp_path, target):
    bundle = tmp_path / "run" / "bundles" / target
    shutil.copytree(shipped_bundle(target), bundle)
    content = unsealed(bundle) | FILLED
    (bundle / disk.MANIFEST).write_text(json.dumps(content))

    from edgeclip.host.export import write

    def of_a_run():
        (found,) = targets.collect(tmp_path / "run")
        assert found.verdict == "cannot say: not validated; not benchmarked"
        json.dumps(provenance._source(bundle), allow_nan=False)
        assert write.up_to_date(bundle, target, toy_target(target), source) in (True, False)

    assert answered(bundle, of_a_run) is not None  # it is whole as it is
    tried = refused = 0
    for place in places(content):
        for value in [*HOSTILE, "gone"]:
            text = changed(content, place, value)
            (bundle / disk.MANIFEST).write_text(text)
            try:
                right = within_memory(lambda: answered(bundle, of_a_run))
            except BaseException as e:
                raise AssertionError(f"{place} = {str(value)[:60]!r}: {e!r}") from e
            tried += 1
            refused += right is None
    print(f"{tried} tried, {refused} refused")
    assert tried > 1_000
    assert refused > tried / 2


def test_fields_that_nobody_knows_are_passed_over(own_bundle):
    bundle = own_bundle("onnx-fp32")
    before = answered(bundle)
    content = unsealed(bundle)
    for place in ((), ("text",), ("golden",)):
        copy = json.loads(json.dumps(content))
        holder = copy
        for key in place:
            holder = holder[key]
        holder["from a later edgeclip"] = {"a": [1]}
        (bundle / disk.MANIFEST).write_text(json.dumps(copy))
        after = answered(bundle)
        assert json.loads(after)["golden"] == json.loads(before)["golden"]


D = 16
FILES = {
    "a bomb of zeros": ("head.npz", npz(weight=np.zeros((8_000, 8_000), np.float32))),
    "a header of a terabyte": ("class_features.npy", header((10**6, 10**6))),
    "a header of too many sizes": ("class_features.npy", header((1,) * 60)),
    "a header of a negative size": ("class_features.npy", header((-1, D))),
    "fewer rows than labels": ("class_features.npy", npy(np.ones((1, D), np.float32))),
    "another width": ("class_features.npy", npy(np.ones((6, 2 * D), np.float32))),
    "another type": ("class_features.npy", npy(np.ones((6, D), np.float64))),
    "objects": ("class_features.npy", header((6, D), "|O", b"cos\nsystem\n")),
    "not a number": ("class_features.npy", npy(np.full((6, D), np.nan, np.float32))),
    "values behind the last": ("class_features.npy", npy(np.ones((6, D), np.float32)) + b"more"),
    "no array": ("class_features.npy", b"\x93NUMPY"),
    "no archive": ("head.npz", b"PK\x03\x04"),
    "an array that nobody asked for": ("head.npz", npz(secret=np.zeros(1))),
    "a member of a terabyte": ("head.npz", npz(weight=header((10**6, 10**6)))),
    "a head of another width": ("head.npz", npz(weight=np.zeros((3, 3), np.float32))),
    "golden pixels of a terabyte": ("golden/pixels.npy", header((10**6, 10**4, 10**4, 3), "|u1")),
    "golden pixels of another size": ("golden/pixels.npy", npy(np.zeros((1, 9, 9, 3), np.uint8))),
    "no golden pixels": ("golden/pixels.npy", npy(np.zeros((0, 32, 32, 3), np.uint8))),
    "golden features of nobody": ("golden/image_features.npy", npy(np.ones((1, D), np.float32))),
    "text features of nobody": ("golden/text_features.npy", npy(np.ones((1, D), np.float32))),
    "golden texts that are none": ("golden/texts.json", b"[1, null]"),
    "no golden texts": ("golden/texts.json", b"[]"),
    "labels that are none": ("labels.json", b'{"cat": 1}'),
    "a label that is a number": ("labels.json", b'["cat", "dog", "car", "tree", "house", 1]'),
    "labels beyond reason": ("labels.json", json.dumps(["x" * 10_000] * 6).encode()),
    "labels without end": ("labels.json", b"[" * 100_000),
    "a tokenizer that is none": ("tokenizer.json", b"{}"),
    "a golden image that is none": ("golden/0.png", b"no image"),
    "a graph that is none": ("image_encoder.onnx", b"no graph"),
    "a graph of nothing": ("image_encoder.onnx", b""),
    "an endless number in a graph": ("image_encoder.onnx", b"\x3a" + b"\xff" * 1_000_000),
}
"""what a stranger puts into a file, with its right hash"""


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_bundle_is_a_claim(own_bundle, name):
    file, content = FILES[name]
    bundle = rewrite(own_bundle("onnx-fp32"), file, content)
    assert within_memory(lambda: answered(bundle)) is None


# --- what leads out of a bundle


@pytest.mark.parametrize("command", ["classify", "embed", "labels", "validate", "bench"])
def test_a_link_is_never_followed(cat, own_bundle, command):
    bundle = own_bundle("onnx-fp32")
    secret = cat.parent.parent / "secret"
    secret.write_text("s3cret")
    (bundle / "notes.txt").symlink_to(secret)
    arguments = {
        "classify": [cat, "--bundle", bundle],
        "embed": [cat, "--out", "f.npy", "--bundle", bundle],
        "labels": [bundle, "pear, plum", "--out", "new"],
        "validate": ["--bundle", bundle],
        "bench": ["--bundle", bundle],
    }
    mistake(command, *arguments[command], says="holds notes.txt, which is a link or a device")
    assert list(cat.parent.rglob("*")) == [cat]


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder", "pipe", "listed link"])
def test_a_folder_holds_what_its_manifest_lists_and_nothing_else(own_bundle, tmp_path, kind):
    bundle = own_bundle("onnx-fp32")
    there = bundle / "golden" / "more"
    if kind == "file":
        there.write_text("x")
    elif kind == "folder":
        there.mkdir()
        (there / "x").write_text("x")
    elif kind == "link to a folder":
        there.symlink_to(tmp_path)
    elif kind == "pipe":
        os.mkfifo(there)
    else:
        (bundle / "labels.json").rename(tmp_path / "labels.json")
        (bundle / "labels.json").symlink_to(tmp_path / "labels.json")
    with pytest.raises(EdgeclipError, match=r"holds (golden/more|labels.json)"):
        read_manifest(bundle)


def test_new_labels_take_nothing_but_the_listed_files(own_bundle, tmp_path):
    bundle = own_bundle("onnx-fp32")
    new = bake_labels(bundle, ["pear", "plum"], tmp_path / "new")
    listed = set(Bundle.load(new, check=True).manifest.files)
    assert {p.relative_to(new).as_posix() for p in new.rglob("*") if p.is_file()} == listed | {
        disk.MANIFEST
    }


def with_external_data(bundle, location, listed):
    """The bundle with one tensor of its graph at `location`; listed: with the bytes there."""
    onnx = require("onnx", "pip install 'edgeclip[train]'")
    file = bundle / "image_encoder.onnx"
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    file.write_bytes(model.SerializeToString())
    if listed:
        (bundle / location).write_bytes(raw)
    resign(bundle)
    return raw


def test_the_tensors_of_a_graph_lie_in_listed_files(own_bundle):
    bundle = own_bundle("onnx-fp32")
    before = Bundle.load(bundle).encode_image([toy_image(1)])
    raw = with_external_data(bundle, "weights.bin", listed=True)
    assert (Bundle.load(bundle).encode_image([toy_image(1)]) == before).all()
    (bundle / "weights.bin").write_bytes(raw[::-1])
    with pytest.raises(EdgeclipError, match=r"weights\.bin was changed"):
        Bundle.load(bundle).encode_image([toy_image(1)])


@pytest.mark.parametrize("place", ["weights.bin", "../w.bin", "/etc/passwd", "*/_ORT_MEM_ADDR_/*"])
def test_the_tensors_of_a_graph_lie_nowhere_else(own_bundle, place):
    bundle = own_bundle("onnx-fp32")
    with_external_data(bundle, place, listed=False)
    with pytest.raises(EdgeclipError, match=r"does not list|has a tensor that lies at"):
        Bundle.load(bundle).encode_image([toy_image(1)])


def test_a_tensor_within_a_graph_within_a_node_is_found_too(tmp_path):
    onnx = require("onnx", "pip install 'edgeclip[train]'")
    from edgeclip.device.runtime import references

    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="deep.bin")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["y"], value=tensor)], "inner", [], []
    )
    outer = onnx.helper.make_graph(
        [onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
        "outer",
        [],
        [],
    )
    (tmp_path / "g.onnx").write_bytes(onnx.helper.make_model(outer).SerializeToString())
    assert references.others(tmp_path / "g.onnx") == ["deep.bin"]


@pytest.mark.parametrize("operator", ["EPContext", "Anything"])
def test_an_operator_of_a_library_is_not_loaded(own_bundle, operator):
    onnx = require("onnx", "pip install 'edgeclip[train]'")
    bundle = own_bundle("onnx-fp32")
    model = onnx.load(bundle / "image_encoder.onnx")
    model.opset_import.append(onnx.helper.make_opsetid("com.stranger", 1))
    model.graph.node.append(onnx.helper.make_node(operator, [], ["n"], domain="com.stranger"))
    rewrite(bundle, "image_encoder.onnx", model.SerializeToString())
    with pytest.raises(EdgeclipError, match=r"EPContext|cannot load it"):
        Bundle.load(bundle).encode_image([toy_image(1)])


def test_a_graph_of_openvino_has_no_entities(own_bundle):
    bundle = own_bundle("openvino-fp16")
    name = read_manifest(bundle).image_encoder
    whole = (bundle / name).read_bytes()
    start = whole.index(b"<net")
    entity = b'<!DOCTYPE n [<!ENTITY s SYSTEM "file:///etc/passwd">]>'
    rewrite(bundle, name, whole[:start] + entity + whole[start:])
    with pytest.raises(EdgeclipError, match="a document type or an entity"):
        Bundle.load(bundle).encode_image([toy_image(1)])
    rewrite(bundle, name, b"ONNX in another coat")
    with pytest.raises(EdgeclipError, match="is no graph of OpenVINO"):
        Bundle.load(bundle).encode_image([toy_image(1)])

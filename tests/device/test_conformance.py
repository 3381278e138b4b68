"""What an implementation makes of the golden images and strings, and the layout that it is written
in.
"""

import json
import shutil

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import (
    answer,
    from_link,
    load_pack,
    read_answers,
    to_link,
    without_padding,
    write_answers,
)
from edgeclip.errors import EdgeclipError
from tests.support.conformance import toy_pack
from tests.support.toy_bundle import SIZE


@pytest.fixture
def bundle(shipped_bundle):
    return Bundle.load(shipped_bundle("onnx-fp32"))


@pytest.fixture
def pack(bundle, tmp_path):
    return toy_pack(tmp_path / "pack", bundle)


@pytest.fixture
def folder(bundle, pack, tmp_path):
    """The bundle's own answers on disk."""
    write_answers(tmp_path / "answers", answer(bundle, pack))
    return tmp_path / "answers"


def same(a, b):
    assert a.ids == b.ids and a.refused == b.refused and a.images.keys() == b.images.keys()
    for name, tensor in a.images.items():
        np.testing.assert_array_equal(tensor, b.images[name])
    return True


def test_the_answer_is_the_encoders_input_and_the_tokenizers_ids(bundle, pack):
    found = answer(bundle, pack)
    assert {i.name for i in pack.manifest.images} == found.images.keys()
    assert all(t.dtype == np.float32 and t.shape == (3, SIZE, SIZE) for t in found.images.values())
    assert found.ids == read_answers(pack.folder / "reference", pack).ids
    assert found.refused == {}


def test_what_cannot_be_read_or_is_too_long_is_refused_with_its_reason(bundle, tmp_path):
    found = answer(bundle, toy_pack(tmp_path / "broken", bundle, broken=True))
    assert found.refused.keys() == {"half", "long"}
    assert "unreadable image" in found.refused["half"]
    assert "the text encoder takes 12" in found.refused["long"]


def test_answers_come_back_from_a_link_and_from_disk(bundle, pack, folder, tmp_path):
    found = answer(bundle, pack)
    assert same(found, from_link(json.loads(json.dumps(to_link(found))), found.images))
    assert same(found, read_answers(folder, pack))
    broken = toy_pack(tmp_path / "broken", bundle, broken=True)
    found = answer(bundle, broken)
    write_answers(tmp_path / "again", found)
    assert same(found, read_answers(tmp_path / "again", broken))


def test_a_foreign_folder_may_hold_uint8_pixels_and_padded_ids_and_needs_no_manifest(folder, pack):
    before = read_answers(folder, pack)
    (folder / "manifest.json").unlink()
    np.save(folder / "images" / "rgb-0.npy", np.zeros((SIZE, SIZE, 3), np.uint8))
    ids = {name: [*row, 0, 0] for name, row in before.ids.items()}
    (folder / "ids.json").write_text(json.dumps(ids))
    after = read_answers(folder, pack)
    assert after.ids == before.ids
    assert after.images["rgb-0"].shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, SIZE, SIZE)), "is float64"),
        (np.zeros((SIZE, SIZE, 3), np.float32), "not float32 [3, 32, 32] or uint8 [32, 32, 3]"),
        (np.zeros((1, 3, SIZE, SIZE), np.float32), "is float32 [1, 3, 32, 32]"),
        (np.full((3, SIZE, SIZE), np.nan, np.float32), "not finite"),
        (np.full((3, SIZE, SIZE), np.inf, np.float32), "not finite"),
    ],
)
def test_a_wrong_tensor_is_named(folder, pack, array, says):
    np.save(folder / "images" / "rgb-1.npy", array)
    with pytest.raises(EdgeclipError) as e:
        read_answers(folder, pack)
    assert "rgb-1.npy" in str(e.value)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ({"plain-text": [1] * 13}, "'plain-text' has 13 ids, the text encoder takes 12"),
        ({"plain-text": [-1]}, "'plain-text' has a negative id"),
        ({"plain-text": "a cat"}, "is not a mapping of names to ids"),
        ([[1, 2]], "is not a mapping of names to ids"),
    ],
)
def test_wrong_ids_are_named(folder, pack, ids, says):
    (folder / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(EdgeclipError, match=r"ids\.json") as e:
        read_answers(folder, pack)
    assert says in str(e.value)


def test_a_missing_or_damaged_answer_is_named_and_may_be_refused_instead(folder, pack, tmp_path):
    (folder / "images" / "grey-2.npy").unlink()
    with pytest.raises(EdgeclipError, match=r"has no images/grey-2\.npy; .* or in refused\.json"):
        read_answers(folder, pack)
    (folder / "refused.json").write_text(json.dumps({"grey-2": "no grey here"}))
    assert read_answers(folder, pack).refused == {"grey-2": "no grey here"}

    ids = json.loads((folder / "ids.json").read_text())
    del ids["plain-text"], ids["slang-text"]
    (folder / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(EdgeclipError, match=r"has no 'plain-text' in ids\.json and 1 more"):
        read_answers(folder, pack)
    (folder / "ids.json").unlink()
    with pytest.raises(EdgeclipError, match=r"has no ids\.json; "):
        read_answers(folder, pack)
    (folder / "images" / "rgb-0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(EdgeclipError, match=r"rgb-0\.npy: not a readable \.npy file"):
        read_answers(folder, pack)
    with pytest.raises(EdgeclipError, match="there is no such folder"):
        read_answers(tmp_path / "nowhere", pack)


def test_a_board_gets_the_questions_without_the_reference(bundle, pack, tmp_path):
    board = tmp_path / "board"
    for name in pack.questions:
        (board / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pack.folder / name, board / name)
    shutil.copy(pack.folder / disk.MANIFEST, board)
    assert not [name for name in pack.questions if name.startswith("reference")]
    assert same(answer(bundle, load_pack(board, answered=False)), answer(bundle, pack))
    with pytest.raises(EdgeclipError, match="is missing"):
        load_pack(board)


def test_a_changed_pack_and_another_folder_are_refused(shipped_bundle, pack):
    with pytest.raises(EdgeclipError, match="is not a conformance pack"):
        load_pack(shipped_bundle("onnx-fp32"))
    (pack.folder / "images" / "rgb-0.png").write_bytes(b"")
    with pytest.raises(EdgeclipError, match=r"images/rgb-0\.png was changed"):
        load_pack(pack.folder)


def test_padding_is_what_stands_behind_the_last_id():
    assert without_padding([5, 0, 7, 0, 0]) == [5, 0, 7]
    assert without_padding([0, 0]) == without_padding([]) == []

"""What is not finite is refused where it arises: in a teacher's rows, in texts, in weights."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.cache import reinforced
from edgeclip.host.cache.precomputed import _class_file
from edgeclip.host.evaluation.scores import image_features
from edgeclip.host.student import EduAttentionHead
from tests.support.images import toy_image
from tests.support.toy_bundle import torch_student
from tests.support.toy_cache import SPEC, D, Tower, build, dataset, encode_text, teacher

WRONG = (math.nan, math.inf, -math.inf, 0.0)
"""zero: of a whole row, which has no direction then"""


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        toy_image(i, 20 + i, 30 - i).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


class Broken(nn.Module):
    """Gives one image of all a row that is none."""

    def __init__(self, value, image):
        super().__init__()
        self.value, self.image, self.seen = value, image, 0

    def forward(self, pixels):
        rows = Tower()(pixels)
        for i in range(len(rows)):
            if self.seen + i == self.image:
                rows[i] = self.value
        self.seen += len(rows)
        return rows


@pytest.mark.parametrize("value", WRONG)
def test_a_teachers_row_is_refused_by_the_images_name(tmp_path, photos, value):
    images = len(dataset(photos).train)
    for row in (0, 3 * images - 1):
        # Those of the first two images are made twice before, for their width and the time.
        t = dataclasses.replace(teacher(), tower=Broken(value, 2 * 2 * 3 + row))
        with pytest.raises(EdgeclipError, match=r"toy: image '\d\d.png': of its views row \d of 3"):
            build(tmp_path / str(row), dataset(photos), t)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("which", ["a a dog", "caption of 07.png"])
def test_a_teachers_text_is_refused(tmp_path, photos, value, which):
    def encode(texts):
        features = encode_text(texts)
        for i, text in enumerate(texts):
            if text == which:
                features[i] = value
        return features

    with pytest.raises(EdgeclipError, match=r"text features of toy: row \d of \d+ is (not|all)"):
        build(
            tmp_path,
            dataset(photos),
            dataclasses.replace(teacher(), encode_text=encode),
            captions=True,
        )


@pytest.mark.parametrize("value", WRONG)
def test_a_file_of_class_features_is_refused(tmp_path, value):
    rows = np.ones((3, D))
    rows[1] = value
    np.save(tmp_path / "c.npy", rows)
    with pytest.raises(EdgeclipError, match=r"c.npy: row 1 of 3 is (not|all)"):
        _class_file(tmp_path / "c.npy", D)


@pytest.mark.parametrize("value", WRONG)
def test_a_reinforced_row_is_broken(value):
    rows = np.ones((2, 6), np.float32)
    rows[1] = value
    with pytest.raises(ValueError, match="row 1 of 2 is"):
        reinforced._unit(rows)


@pytest.mark.parametrize("value", WRONG[:3])
@pytest.mark.parametrize("where", ["student", "head", "class features"])
def test_no_student_is_saved_with_a_weight_that_is_none(tmp_path, value, where):
    student = torch_student()
    width = student.projector[0].out_features
    head = EduAttentionHead(width, R.EduAttention())
    features = np.ones((2, width), np.float32)
    if where == "class features":
        features[1] = value
    else:
        module = {"student": student, "head": head}[where]
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] = value
    with pytest.raises(EdgeclipError, match="is not finite; train it again"):
        students.save(tmp_path / "student", student, head, {}, features)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("value", WRONG)
def test_no_image_is_scored_by_features_that_are_none(photos, value):
    images = dataset(photos).train
    with pytest.raises(EdgeclipError, match=r"toy: of images 00.png to 11.png, row 5 of 12 is"):
        image_features(Broken(value, 5), images, SPEC, "toy", torch.device("cpu"))


@pytest.mark.parametrize("value", WRONG[:3])
def test_no_json_is_written_with_a_number_that_is_none(tmp_path, value):
    with pytest.raises(EdgeclipError, match="would hold a number that is not finite"):
        disk.write_json(tmp_path / "a.json", {"deep": [1.0, {"er": value}]})
    assert not (tmp_path / "a.json").exists()

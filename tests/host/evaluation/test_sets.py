"""A run's own set is asked the question that the run was trained for, or by another name."""

import pytest

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from edgeclip.host.evaluation.sets import load_sets
from tests.support.webdataset import webdataset

RECIPE = """
data: {kind: webdataset, name: animals, root: animals}
teacher: {kind: conse}
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}}
losses: {kl: {weight: 1}}
train: {epochs: 1}
"""
PROMPTS = "zeroshot_classification_templates.txt"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    webdataset(tmp_path / "animals")
    disk.write_json(
        tmp_path / "run" / "student" / "student.json",
        {"labels": ["cat", "dog", "car"], "templates": ["a {c}", "the {c}"]},
    )
    (tmp_path / "r.yaml").write_text(RECIPE)
    return recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("classnames.txt", "cat\ndof\ncar\n", "its labels .*'dof' was 'dog'"),
        ("classnames.txt", "cat\ncar\ndog\n", "its labels .*'car' was 'dog'"),
        ("classnames.txt", "cat\ndog\ncar\nowl\n", "its labels .*4 labels now, 3 then"),
        (PROMPTS, "a {c}\nthf {c}\n", "its templates .*'thf {c}' was 'the {c}'"),
    ],
)
def test_other_words_are_another_set(tmp_path, asked, file, content, says):
    (tmp_path / "animals" / file).write_text(content)
    for given in ((), ("animals=animals",), ("animals",)):
        with pytest.raises(EdgeclipError, match=says):
            load_sets(tmp_path / "run", asked, "zero_shot", given)
    ((_, dataset),) = load_sets(tmp_path / "run", asked, "zero_shot", ("mine=animals",))
    assert "\n".join([*dataset.classes, ""]) == content or file == PROMPTS


def test_its_own_words_are_scored(tmp_path, asked):
    ((_, dataset),) = load_sets(tmp_path / "run", asked, "zero_shot", ())
    assert dataset.classes == ["cat", "dog", "car"]

"""An open-vocabulary student: its text tower learns the teacher's words, ships, and answers
without torch as with it.
"""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from edgeclip.device.bundle import Bundle
from edgeclip.device.target import load as load_target
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.data import shapes
from edgeclip.host.distill.run import distill
from edgeclip.host.export import export
from edgeclip.host.export.source import from_run
from tests.support.command import mistake
from tests.support.files import REPO

TEXT = {
    "kind": "open_clip",
    "model": "tiny-text",
    "weights": "random",
    "config": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 8,
            "head_width": 8,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    },
}
NEW = ["a yellow star", "two people shaking hands", "a red hexagon"]


def smoke(**student):
    """recipes/smoke.yaml with a text tower in its student, and shared blocks in its image tower."""
    recipe = yaml.safe_load((REPO / "recipes" / "smoke.yaml").read_text())
    recipe["student"] |= {
        "text": TEXT,
        "text_weight": 1.0,
        "share": {"blocks": 1, "times": 2},
        **student,
    }
    recipe["train"] |= {"lr": 3e-3, "epochs": 6}
    return recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    shapes.write(folder / ".data" / "shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "open.yaml").write_text(json.dumps(smoke()))
        results = distill(folder / "open.yaml")
        export(
            from_run(folder / "runs/open"),
            "onnx-fp32",
            load_target("onnx-fp32")[1],
            folder / "bundle",
        )
        yield folder, results


def test_fd_on_text_falls(workplace):
    _, results = workplace
    course = [row["text_feature"] for row in results.log]
    assert course[0] > 2 * course[-1]


def test_words_that_were_never_baked_are_the_students_own_with_and_without_torch(workplace):
    folder, _ = workplace
    bundle, text = Bundle.load(folder / "bundle"), students.load_text(folder / "runs/open/student")
    with torch.inference_mode():
        expected = text.module(students.token_ids(text, NEW)).numpy()
    np.testing.assert_allclose(bundle.encode_text(NEW), expected, atol=1e-4)
    np.testing.assert_allclose(
        bundle.bake(NEW),
        students.class_features(text, NEW, tuple(bundle.manifest.templates)),
        atol=1e-4,
    )

    image = shapes.draw(0, random.Random(1))
    got = {r["label"]: r["score"] for r in bundle.classify(image, NEW)}
    student = students.load(folder / "runs/open/student")[0]
    from edgeclip.device.preprocess import normalize
    from edgeclip.device.zero_shot import class_scores

    with torch.inference_mode():
        feature = student(
            torch.from_numpy(normalize(bundle.pixels(image)[None], bundle.preprocess))
        ).numpy()
    scores = class_scores(
        feature,
        students.class_features(text, NEW, tuple(bundle.manifest.templates)),
        bundle.head,
    )[0]
    np.testing.assert_allclose([got[label] for label in NEW], scores, atol=1e-4)


def test_baked_classes_are_the_teachers_and_both_texts_are_scored(workplace):
    folder, results = workplace
    bundle = Bundle.load(folder / "bundle")
    cached = [
        np.load(path) for path in (folder / "cache").glob("*/class_features.npy")
    ]  # of two teachers
    assert any(np.array_equal(bundle.class_features, w) for w in cached)
    (row,) = results.sets
    assert row.student == row.student_teacher_text
    assert row.student_own_text is not None
    own = students.load_text(folder / "runs/open/student")
    assert results.models.student.text_parameters == sum(p.numel() for p in own.module.parameters())


def test_the_recipe_may_bake_the_students_own(workplace):
    folder, _ = workplace
    recipe = smoke(class_features="student")
    recipe["train"] |= {"epochs": 0}
    recipe["losses"] = {"kl": {}, "if_align": {}}  # none of them looks at texts
    (folder / "own.yaml").write_text(json.dumps(recipe))
    (row,) = distill(folder / "own.yaml").sets
    text = students.load_text(folder / "runs/own/student")
    templates = tuple(
        (folder / ".data/shapes/zeroshot_classification_templates.txt").read_text().split("\n")[:2]
    )
    np.testing.assert_allclose(
        np.load(folder / "runs/own/student/class_features.npy"),
        students.class_features(text, shapes.CLASSES, templates),
        atol=1e-6,
    )
    assert row.student == row.student_own_text

    # FD on text reaches the text tower only: the image side is bit for bit that of a run without
    # one
    recipe["student"] |= {"text": None, "class_features": "teacher"}
    (folder / "without.yaml").write_text(json.dumps(recipe))
    distill(folder / "without.yaml")
    own, without = (
        load_file(folder / "runs" / name / "student/student.safetensors")
        for name in ("own", "without")
    )
    assert all(torch.equal(own[k], v) for k, v in without.items()) and {
        k.split(".")[0] for k in own.keys() - without.keys()
    } == {"text"}


def test_a_text_tower_comes_back_from_disk_and_leaves_the_image_side_alone(workplace):
    folder, _ = workplace
    one, two = (students.load_text(folder / "runs/open/student") for _ in range(2))
    ids = students.token_ids(one, NEW)
    with torch.inference_mode():
        features = one.module(ids)
        assert torch.equal(features, two.module(ids))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert not any("visual" in name for name in one.module.state_dict())


def test_a_vocabulary_that_is_too_small_is_refused():
    spec = R.OpenClip(
        model="own",
        weights="random",
        config=TEXT["config"] | {"text_cfg": TEXT["config"]["text_cfg"] | {"vocab_size": 100}},
    )
    with pytest.raises(
        EdgeclipError,
        match="has a vocabulary of 100, its tokenizer has 49408; give vocab_size: 49408",
    ):
        students.build_text(spec, 8)


def test_a_caption_that_is_too_long_is_refused_before_anything_is_made(workplace):
    folder, _ = workplace
    short = json.loads(json.dumps(TEXT))
    short["config"]["text_cfg"]["context_length"] = 4
    (folder / "short.yaml").write_text(json.dumps(smoke(text=short)))
    mistake(
        "distill",
        "short.yaml",
        says="tokens, the text encoder takes 4; shorten it",
        only_line=False,
    )
    assert not (folder / "runs/short").exists()


def test_a_text_tower_needs_captions_and_own_class_features_need_a_text_tower(workplace):
    folder, _ = workplace
    recipe = smoke()
    recipe["losses"] = {"feature": {"weight": 1}}
    recipe["data"] = {"kind": "folders", "name": "shop", "root": "shop"}
    recipe["evaluation_data"] = None
    for c in ("cat", "dog"):
        (folder / "shop" / c).mkdir(parents=True)
        for i in range(8):
            shapes.draw(0, random.Random(i)).save(folder / "shop" / c / f"{i}.png")
    (folder / "bare.yaml").write_text(json.dumps(recipe))
    mistake("distill", "bare.yaml", says="a loss or student.text needs captions", only_line=False)
    (folder / "no.yaml").write_text(json.dumps(smoke(text=None, class_features="student")))
    mistake("distill", "no.yaml", says="student.class_features: the student has no text tower")
    assert not (folder / "runs/bare").exists() and not (folder / "runs/no").exists()

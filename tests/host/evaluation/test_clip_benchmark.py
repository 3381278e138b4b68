"""CLIP_benchmark counts what `classify` answers: its own main on its own layout, top-1 and top-5
to the last image.
"""

import json
import os
import subprocess
import sys
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeclip.device.bundle import Bundle
from edgeclip.device.zero_shot import class_scores, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host.evaluation import clip_benchmark as judge
from tests.support.damage import resign
from tests.support.environments import python_with
from tests.support.files import REPO
from tests.support.images import add_member, encoded, toy_image
from tests.support.toy_bundle import LABELS

IMAGES = 60
OFFSET = {
    "offset": 0.05,
    "labels": LABELS[:3],
    "images": 8,
    "rule": "midway",
    "labeled_named": 1.0,
    "others_named": 1.0,
    "labeled_named_without": 1.0,
    "others_named_without": 0.0,
}
HEADLESS = {"alpha": 0.0}


def images():
    """Not square, so that both sides have to resize and crop them alike."""
    return [toy_image(9000 + i, 44 + i % 9, 50 - i % 7) for i in range(IMAGES)]


# --- the algebra


def theirs(model, labels, templates, pixels):
    """CLIP_benchmark's arithmetic, written out: mean over prompts, unit rows, a product. [B, N]"""
    rows = []
    for label in labels:
        embeddings = model.encode_text(model.tokenize(prompts([label], templates)))
        mean = F.normalize(embeddings, dim=-1).mean(dim=0)
        rows.append(mean / mean.norm())
    features = F.normalize(model.encode_image(pixels), dim=-1)
    return (100.0 * features @ torch.stack(rows, dim=1)).numpy()


@pytest.mark.parametrize("offset", [0.0, 0.05, -0.3])
@pytest.mark.parametrize(
    "changes",
    [
        HEADLESS,
        {"fc": "key_value", "alpha": 0.7},
        {"fc": "output", "normalize": False, "alpha": 2.0},
        {"fc": "query", "normalize": False, "center": True, "alpha": 1.0},
        {"fc": "none", "center": True, "alpha": 0.5},
    ],
)
def test_a_plain_product_ranks_as_the_head(shipped_bundle, changes, offset):
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    bundle.head = bundle.head._replace(**changes)
    bundle.offsets = offset * np.array([1, 1, 0, 0, 1, 0], np.float32)
    pixels = np.stack([bundle.pixels(image) for image in images()])
    ours = bundle.scores(bundle.encode_pixels(pixels))
    model = judge.ShippedHead(bundle)
    judged = theirs(model, bundle.labels, bundle.manifest.templates, torch.from_numpy(pixels))
    np.testing.assert_array_equal(np.argsort(-judged), np.argsort(-ours))
    norm = np.linalg.norm(model.encode_image(torch.from_numpy(pixels)), axis=1)[:, None]
    scale = 100 / norm / np.linalg.norm(model.classes[0])
    np.testing.assert_allclose(judged / scale, ours, atol=1e-6)


def test_all_classes_have_one_norm():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(7, 5)).astype(np.float32)  # no unit rows: nothing rests on it
    norms = np.linalg.norm(judge.extended(features, rng.normal(size=7)), axis=1)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-12)


def test_some_of_the_labels_in_another_order_are_judged_as_classify_does(shipped_bundle):
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    some = [LABELS[i] for i in (4, 0, 3)]
    pixels = np.stack([bundle.pixels(image) for image in images()])
    judged = theirs(
        judge.ShippedHead(bundle), some, bundle.manifest.templates, torch.from_numpy(pixels)
    )
    ours = [bundle.classify(image, some, top=1)[0]["label"] for image in images()]
    assert [some[i] for i in judged.argmax(axis=1)] == ours


# --- its own main


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return python_with("clip-benchmark", tmp_path_factory)


@pytest.fixture
def with_offset(own_bundle):
    def get(target):
        folder = own_bundle(target)
        resign(folder, class_offset=OFFSET)
        return folder

    return get


def answers(bundle, labels=None, top=5, offset=True):
    """Return the best `top` labels of each image."""
    ranked = [bundle.classify(image, labels, top, offset) for image in images()]
    return [[r["label"] for r in row] for row in ranked]


def write_data(folder, truth, classes, templates):
    """Write the images and their labels `truth` in CLIP_benchmark's layout: a split of two
    shards.
    """
    (folder / "test").mkdir(parents=True)
    for shard in (0, 1):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for i, image in enumerate(images()):
                if i * 2 // IMAGES == shard:
                    add_member(tar, f"{i:03d}.png", encoded(image))
                    add_member(tar, f"{i:03d}.cls", str(classes.index(truth[i])).encode())
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return folder


def mostly(answered, classes):
    """Return labels that are the first answers, every fifth one the next class."""
    places = [classes.index(row[0]) + (i % 5 == 0) for i, row in enumerate(answered)]
    return [classes[place % len(classes)] for place in places]


def call(python, here, bundle, data, *more, path=REPO):
    """Run the launcher as a user does, in an environment that has CLIP_benchmark."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [python, "-m", "edgeclip.clip_benchmark", "eval", "--model_type", "edgeclip"]
    command += ["--model", bundle, "--dataset", "wds/toy", "--dataset_root", data]
    command += ["--task", "zeroshot_classification", *more]
    return subprocess.run(
        command, cwd=here, env=kept | {"PYTHONPATH": str(path)}, capture_output=True, text=True
    )


def counted(done, here):
    """Return how many images CLIP_benchmark found right among the first one and the first five."""
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = here.glob("*.json")
    metrics = json.loads(path.read_text())["metrics"]
    return [metrics[key] * IMAGES for key in ("acc1", "acc5")]


def right(answered, truth):
    pairs = list(zip(answered, truth, strict=True))
    return [sum(label in row[:k] for row, label in pairs) for k in (1, 5)]


@pytest.mark.slow  # an environment of its own, and torch, scikit-learn and more to import
@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("onnx-fp32", ["--no_amp", "--num_workers", "0"]),
        ("onnx-int8", []),
        ("openvino-int8", ["--no_amp", "--num_workers", "1", "--batch_size", "7"]),
    ],
)
def test_it_counts_what_classify_answers(python, with_offset, here, tmp_path, target, more):
    folder = with_offset(target)
    bundle = Bundle.load(folder)
    ours = answers(bundle)
    assert ours != answers(bundle, offset=False)
    truth = mostly(ours, LABELS)
    data = write_data(tmp_path / "data", truth, LABELS, bundle.manifest.templates)
    found = counted(call(python, here, folder, data, "--pretrained", "", *more), here)
    assert found == right(ours, truth)
    assert 0 < found[0] < found[1] < IMAGES


@pytest.mark.slow
def test_plain_features_take_classes_that_were_never_baked(python, shipped_bundle, here, tmp_path):
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    classes, templates = ["pear", "plum", "house", "red umbrella", "letter"], ["the {c}", "{c}"]
    features = bundle.encode_image(images())
    texts = bundle.encode_text(prompts(classes, templates)).reshape(5, 2, -1).mean(axis=1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    ranked = np.argsort(-class_scores(features, texts), axis=1)
    ours = [[classes[i] for i in row] for row in ranked]
    truth = mostly(ours, classes)
    data = write_data(tmp_path / "data", truth, classes, templates)
    more = ["--pretrained", "features", "--no_amp", "--num_workers", "0"]
    done = call(python, here, bundle.folder, data, *more)
    assert counted(done, here)[0] == right(ours, truth)[0] == 48


# --- what is refused


def last_line(done):
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: "), line
    assert "; " in line, line
    return line


@pytest.mark.slow
def test_classes_that_are_not_the_bundles_are_refused(python, shipped_bundle, here, tmp_path):
    folder = shipped_bundle("onnx-fp32")
    classes = ["pear", *LABELS]
    templates = Bundle.load(folder).manifest.templates
    data = write_data(tmp_path / "data", ["pear"] * IMAGES, classes, templates)
    done = call(python, here, folder, data, "--pretrained", "", "--num_workers", "0")
    assert "prompts 'a photo of a pear', 'a pear': are of none of the bundle's 6" in last_line(done)
    done = call(python, here, folder, tmp_path / "gone", "--pretrained", "")
    assert "gone/test/nshards.txt: there is no such file; check --dataset_root" in last_line(done)
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_numpy_that_it_cannot_count_with_is_refused_before_it_begins(python, here, tmp_path):
    if tuple(int(part) for part in np.__version__.split(".")[:2]) < (2, 4):
        pytest.skip("data: this NumPy is one that it can count with")
    path = os.pathsep.join([str(REPO), os.path.dirname(os.path.dirname(np.__file__))])
    done = call(python, here, "no-bundle", tmp_path, "--pretrained", "", path=path)
    assert f"cannot count with NumPy {np.__version__}" in last_line(done)


def test_without_it_one_line_says_how_to_get_it(here):
    code = (
        "import runpy, sys\n"
        "sys.modules['clip_benchmark'] = None\n"
        "runpy.run_module('edgeclip.clip_benchmark', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True
    )
    line = last_line(done)
    assert done.stderr.splitlines() == [line]
    assert "clip_benchmark is not installed; pip install 'edgeclip[clip-benchmark]'" in line


def test_what_is_no_bundle_and_what_is_not_of_one_is_refused(shipped_bundle, tmp_path):
    with pytest.raises(EdgeclipError, match="no-bundle"):
        judge.load(str(tmp_path / "no-bundle"), "", None, "cpu")
    with pytest.raises(EdgeclipError, match=r"--pretrained openai: .* has its weights in it"):
        judge.load(str(shipped_bundle("onnx-fp32")), "openai", None, "cpu")
    model, _, tokenize = judge.load(str(shipped_bundle("onnx-fp32")), "", None, "cpu")
    with pytest.raises(EdgeclipError, match=r"templates .*'a photo of a cat'"):
        tokenize(["a drawing of a cat"])
    with pytest.raises(EdgeclipError, match="this task makes no class features"):
        model.encode_image(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_a_bundle_without_labels_or_texts_says_what_is_left(own_bundle):
    from edgeclip import disk

    folder = own_bundle("onnx-fp32")
    disk.write_json(folder / "labels.json", [])
    (folder / "text_encoder.onnx").unlink()
    resign(folder, text=None)
    with pytest.raises(EdgeclipError, match="has no baked labels; give --pretrained features"):
        judge.load(str(folder), "", None, "cpu")
    _, _, tokenize = judge.load(str(folder), "features", None, "cpu")
    with pytest.raises(EdgeclipError, match="this bundle has no text encoder"):
        tokenize(["a cat"])


def test_the_bundles_path_is_a_name_in_the_results_file():
    asked = Namespace(
        model=["runs/a b/bundles/onnx-int8/"], output="{dataset}_{model}.json", pretrained_model=""
    )
    assert judge._output(asked) == ["--output", "{dataset}_runs_a_b_bundles_onnx-int8.json"]
    asked.pretrained_model = ["a,"]
    with pytest.raises(EdgeclipError, match="--pretrained_model: is for models of others"):
        judge._output(asked)
    asked = Namespace(model=["a", "b"], output="o.json", pretrained_model="")
    with pytest.raises(EdgeclipError, match="--model: names several bundles"):
        judge._output(asked)

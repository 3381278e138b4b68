"""What edgeclip writes for others loads with their own code, and gives the bundle's answers."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import optimum
from tests.support.environments import python_with
from tests.support.images import toy_image

TEXTS = ["a photo of a cat", "a car", "red umbrella"]
LOAD = """
import json, sys, numpy as np, torch
from tokenizers import Tokenizer
folder, pixels, texts = sys.argv[1:4]
texts = Tokenizer.from_file(folder + "/tokenizer.json").encode_batch(json.loads(texts))
ids, pixels = torch.tensor([t.ids for t in texts]), torch.from_numpy(np.load(pixels))
"""
CALL = """
out = model(input_ids=ids, pixel_values=pixels)
np.savez(folder + ".npz", ids=ids, image=out.image_embeds, text=out.text_embeds, logits=out.logits_per_image.detach(), t=out.logits_per_text.detach())
"""
CLASSES = {
    "optimum-onnx": "from optimum.onnxruntime import ORTModelForZeroShotImageClassification as M\nmodel = M.from_pretrained(folder)\n",
    "optimum-intel": "from optimum.intel import OVModelOpenCLIPForZeroShotImageClassification as M\n"
    "scale = json.load(open(folder + '/open_clip_config.json'))['logit_scale_init_value']\n"
    "model = M.from_pretrained(folder, init_logit_scale=scale, ov_config={'INFERENCE_PRECISION_HINT': 'f32'})\n",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python that has one of them and sees this one's packages: one wants an older transformers
    than the other.
    """
    return lambda package: python_with(package, tmp_path_factory)


def answers(python, package, folder, tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    code = [
        python,
        "-c",
        LOAD + CLASSES[package] + CALL,
        str(folder),
        str(tmp_path / "x.npy"),
        json.dumps(TEXTS),
    ]
    done = subprocess.run(code, capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(f"{folder}.npz")


@pytest.mark.slow  # an environment of its own for each of optimum's packages
@pytest.mark.parametrize(
    ("package", "target", "head"),
    [
        ("optimum-onnx", "onnx-fp32", True),
        ("optimum-onnx", "onnx-int8", False),
        ("optimum-intel", "openvino-fp16", False),
        ("optimum-intel", "openvino-int8", False),
    ],
)
def test_optimum_gives_the_bundles_answers(
    shipped_bundle, environment, tmp_path, package, target, head
):
    bundle = Bundle.load(shipped_bundle(target))
    folder = optimum.write(bundle.folder, tmp_path / target, head=head)
    pixels = np.stack([bundle.pixels(toy_image(i)) for i in range(5)])
    x = ((pixels.astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    found = answers(environment(package), package, folder, tmp_path, np.ascontiguousarray(x))
    image, text = bundle.encode_pixels(pixels), bundle.encode_text(TEXTS)
    np.testing.assert_allclose(found["image"], image, atol=1e-5)
    np.testing.assert_allclose(found["text"], text, atol=1e-5)
    logits = bundle.logit_scale * class_scores(image, text, bundle.head if head else None)
    np.testing.assert_allclose(found["logits"], logits, atol=bundle.logit_scale * 1e-5)
    np.testing.assert_array_equal(found["t"], found["logits"].T)


@pytest.mark.parametrize("fc", ["query", "key_value", "output", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_class_scores_as_a_graph_are_the_bundles(source, fc, normalize, center):
    import onnxruntime as ort

    head = source.head._replace(
        fc=fc,
        normalize=normalize,
        center=center,
        bias=np.linspace(-1, 1, len(source.head.bias), dtype=np.float32),
    )
    rng = np.random.default_rng(0)
    u, w = (
        v / np.linalg.norm(v, axis=1, keepdims=True)
        for v in (rng.normal(size=(n, 16)).astype(np.float32) for n in (3, 7))
    )
    for h in (head, None):
        model = optimum._scores(h, 20.0, 16, 18)
        logits, back, texts, images = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"u": u, "w": w})
        np.testing.assert_allclose(logits, 20.0 * class_scores(u, w, h), atol=2e-5)
        assert (back == logits.T).all()
        assert (texts == w).all()
        assert (images == u).all()


def test_the_folder_says_what_it_is(shipped_bundle, source, tmp_path):
    bundle = shipped_bundle("onnx-int8")
    folder = optimum.write(bundle, tmp_path / "o")
    manifest, config = (
        disk.read_manifest(folder, "optimum"),
        json.loads((folder / "config.json").read_text()),
    )
    assert (
        manifest["parents"]["bundle"] == disk.sha256(bundle / disk.MANIFEST)
        and manifest["licenses"] == source.licenses
    )
    assert (
        config["logit_scale_init_value"] == pytest.approx(math.log(20))
        and config["preprocess_cfg"]["mean"] == [0.5] * 3
    )


def test_what_optimum_cannot_say_is_refused(shipped_bundle, tmp_path):
    with pytest.raises(EdgeclipError, match=r"EduAttention \(alpha 0.100\).*--no-head"):
        optimum.write(shipped_bundle("openvino-fp16"), tmp_path / "o")
    with pytest.raises(
        EdgeclipError, match="no class for a TensorRT engine; take an ONNX or OpenVINO target"
    ):
        optimum.check("tensorrt", True, None, "t")
    with pytest.raises(
        EdgeclipError,
        match="needs a text encoder, and this has none; distil with text_encoder: true",
    ):
        optimum.check("onnxruntime", False, None, "t")
    assert not (tmp_path / "o").exists()


# --- open_clip

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TIMM = {"image_size": 64, "timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": ""}
STUDENTS = {
    "timm, MLP": (
        {"kind": "timm", "model": "tf_efficientnet_lite0", "weights": "random", "image_size": 64},
        12,
    ),
    "timm, Linear": (
        {"kind": "timm", "model": "tf_efficientnet_lite0", "weights": "random", "image_size": 64},
        None,
    ),
    "timm ViT, MLP of full width": (
        {"kind": "timm", "model": "vit_tiny_r_s16_p8_224", "weights": "random", "image_size": 224},
        16,
    ),
    "open_clip's timm tower, MLP": ({"vision_cfg": TIMM}, 16),
    "open_clip's timm tower, Linear": ({"vision_cfg": TIMM}, None),
    "open_clip's ViT, Linear": ({"vision_cfg": VISION}, None),
    "open_clip's ResNet, Linear": (
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}},
        None,
    ),
}


def made(folder, source, tower, hidden, own_text=True, **recipe):
    """A run folder with a student of 8 dimensions, its batch norms and biases not the initial
    ones, and what export takes of it.
    """
    import msgspec

    from edgeclip import config
    from edgeclip.host import recipe as R
    from edgeclip.host import student as students
    from tests.support.families import lively

    if "kind" not in tower:
        tower = {
            "kind": "open_clip",
            "model": "own",
            "weights": "random",
            "config": {"embed_dim": 24, "text_cfg": TEXT, **tower},
        }
    text = {
        "kind": "open_clip",
        "model": "tiny-text",
        "weights": "random",
        "config": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    }
    asked = {
        "data": {"kind": "openmoji"},
        "teacher": {**text, "config": {**text["config"], "embed_dim": 8}},
        "student": {"tower": tower, "projector_hidden": hidden, "text": text if own_text else None},
        "losses": {"kl": {}},
        **recipe,
    }
    asked = config.convert(asked, R.Recipe, "test")
    student, preprocess = students.build(asked.student, 8)
    lively(student)
    with torch.no_grad():
        for _ in range(3):
            student(torch.randn(4, 3, preprocess.size, preprocess.size))
    text = students.build_text(asked.student.text, 8) if own_text else None
    description = {"architecture": msgspec.to_builtins(asked.student), "embed_dim": 8}
    students.save(
        folder / "student", student.eval(), None, description, np.eye(1, 8, dtype=np.float32), text
    )
    disk.write_json(folder / "recipe.json", R.description(asked))
    disk.write_json(folder / "roots.json", R.roots(asked))
    return source._replace(image_encoder=student, preprocess=preprocess), text


@pytest.mark.parametrize("name", STUDENTS)
def test_open_clip_loads_the_student_itself(name, source, tmp_path):
    import open_clip as library

    from edgeclip.device.preprocess import normalize, to_pixels
    from edgeclip.host import recipe as R
    from edgeclip.host.export import open_clip
    from edgeclip.host.student import token_ids
    from edgeclip.host.towers import weights

    own, text = made(tmp_path / "run", source, *STUDENTS[name])
    folder = open_clip.write(tmp_path / "run", own, tmp_path / "out" / "small-student")
    library.add_model_config(folder / "small-student.json")
    image, p = toy_image(3, 300, 280), own.preprocess
    plain, _, _ = library.create_model_and_transforms(
        "small-student", pretrained=str(folder / "open_clip_model.safetensors")
    )
    whole, _, transform = library.create_model_and_transforms(f"local-dir:{folder}")
    x = torch.from_numpy(normalize(to_pixels(image, p)[None], p))
    torch.testing.assert_close(transform(image)[None], x, atol=1e-6, rtol=0)
    with torch.inference_mode():
        for model in (plain.eval(), whole.eval()):
            torch.testing.assert_close(
                model.encode_image(x, normalize=True), own.image_encoder(x), atol=1e-5, rtol=0
            )
            ids = library.get_tokenizer("small-student")(TEXTS)
            assert (ids == token_ids(text, TEXTS)).all()
            torch.testing.assert_close(
                model.encode_text(ids, normalize=True), text.module(ids), atol=1e-5, rtol=0
            )
            assert model.logit_scale.exp().item() == pytest.approx(source.logit_scale)
        weights_file = str(folder / "open_clip_model.safetensors")
        for file, same in (
            ("open_clip_config.json", True),
            ("small-student.json", p.mean == library.OPENAI_DATASET_MEAN),
        ):  # and so do we
            spec = R.OpenClip(
                model="small-student",
                weights=weights_file,
                config=disk.read_json(folder / file),
                like="default",
            )
            back, preprocess = weights.open_clip_model(spec)
            torch.testing.assert_close(
                back.encode_image(x, normalize=True), own.image_encoder(x), atol=1e-5, rtol=0
            )
            assert (preprocess == p) is same
    with pytest.raises(
        EdgeclipError,
        match="config of small-student: its texts go through a model of Hugging Face's",
    ):
        weights.open_clip_model(
            R.OpenClip(
                model="small-student",
                weights="random",
                config={"text_cfg": {"hf_model_name": "x"}},
            )
        )


def test_open_clip_takes_the_teachers_text_tower_where_the_student_has_none(source, tmp_path):
    from edgeclip.host.export import open_clip

    own, _ = made(tmp_path / "run", source, *STUDENTS["timm, MLP"], own_text=False)
    manifest = disk.read_manifest(
        open_clip.write(tmp_path / "run", own, tmp_path / "named"), "open_clip"
    )
    assert manifest["name"] == "named" and set(manifest["files"]) == {
        "named.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }


@pytest.mark.parametrize(
    ("tower", "hidden", "recipe", "says"),
    [
        (
            {"vision_cfg": VISION},
            16,
            {},
            "this projector has a hidden layer; distil with projector_hidden: null",
        ),
        (
            {"vision_cfg": {**VISION, "width": 4, "head_width": 2}},
            None,
            {},
            "its projector's bias has no place: 8 dimensions behind a tower of 4",
        ),
        (
            STUDENTS["timm, MLP"][0],
            17,
            {},
            r"17 hidden units, open_clip's has 16; distil with projector_hidden: 16 or less",
        ),
        (
            {**STUDENTS["timm, MLP"][0], "model": "mobilenetv4_conv_small_035"},
            16,
            {},
            "a layer behind its pooling",
        ),
        ({**STUDENTS["timm, MLP"][0], "model": "vit_tiny_r_s16_p8_224"}, 16, {}, "size mismatch"),
        (
            STUDENTS["timm, MLP"][0],
            16,
            {"teacher": {"kind": "conse"}},
            "no open_clip text tower; use --layout optimum",
        ),
    ],
)
def test_what_open_clip_cannot_say_is_refused(source, tmp_path, tower, hidden, recipe, says):
    from edgeclip.host.export import open_clip

    own, _ = made(tmp_path / "run", source, tower, hidden, own_text=not recipe, **recipe)
    with pytest.raises(EdgeclipError, match=says):
        open_clip.write(tmp_path / "run", own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layout", "optimum"], "Missing option '--target'"),
        (["--layout", "open_clip", "--target", "onnx-fp32"], "leave --target out"),
        (
            ["--layout", "open_clip", "--model", "ViT-B-32", "--weights", "random"],
            "is for a run's student",
        ),
        (["--no-head", "--target", "onnx-fp32"], "--no-head needs --layout optimum"),
    ],
)
def test_options_that_do_not_go_together(arguments, says):
    from tests.support.command import run

    result = run("export", *arguments)
    assert result.exit_code == 2 and says in result.stderr

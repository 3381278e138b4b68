"""YAML is read strictly: every shipped file loads, and every mistake is named with its field."""

import re

import pytest

from edgeclip import config
from edgeclip.device import profile as device
from edgeclip.device import target
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from tests.support.files import REPO
from tests.support.recipe_errors import RECIPE, error


def write(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((REPO / "export").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_target_loads_and_says_its_command(path):
    assert target.load(path.stem)[0] == path.stem
    assert f"--target {path.stem}" in path.read_text().split("\n\n")[0] + path.read_text()


@pytest.mark.parametrize("path", sorted((REPO / "devices").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_device_loads(path):
    assert device.load(path.stem)[0] == path.stem


def test_the_shipped_folders_are_not_empty():
    assert {"quickstart", "mobile", "smoke", "grocery", "clothing"} <= set(config.shipped("recipe"))
    of = {
        "onnx": ("fp32", "fp16", "int8", "int8-arm"),
        "openvino": ("fp16", "int8"),
        "tensorrt": ("fp16", "int8", "fp8"),
    }
    assert {f"{runtime}-{form}" for runtime, forms in of.items() for form in forms} <= set(
        config.shipped("target")
    )
    assert {"host-cpu", "jetson-orin-nano"} <= set(config.shipped("device"))


def test_an_unknown_key_at_the_top_is_named_with_its_neighbor(tmp_path):
    assert "losess: unknown field; did you mean 'losses'?" in error(
        tmp_path, RECIPE.replace("losses", "losess")
    )


def test_an_unknown_key_inside_a_struct_is_named_with_its_path(tmp_path):
    assert "losses.kl.wieght: unknown field; did you mean 'weight'?" in error(
        tmp_path, RECIPE.replace("{weight", "{wieght")
    )


def test_an_unknown_key_inside_a_tagged_union_is_judged_by_its_kind(tmp_path):
    assert "data.rot: unknown field; did you mean 'root'?" in error(
        tmp_path, RECIPE.replace("root: /a", "rot: /a")
    )
    assert "student.tower.imagesize: unknown field; did you mean 'image_size'?" in error(
        tmp_path, RECIPE.replace("image_size", "imagesize")
    )
    # a field of another kind is unknown to this one
    assert "data.train: unknown field" in error(
        tmp_path, RECIPE.replace("root: /a", "root: /a, train: x")
    )


def test_an_unknown_kind_is_named_with_its_neighbor(tmp_path):
    assert "data.kind: unknown kind 'folder'; did you mean 'folders'?" in error(
        tmp_path, RECIPE.replace("kind: folders", "kind: folder")
    )


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("weight: 1", "weight: heavy", "losses.kl.weight"),
        ("image_size: 64", "image_size: 6.5", "student.tower.image_size"),
        ("image_size: 64", "image_size: 0", "image_size"),
        ("weight: 1", "weight: -1", "losses.kl.weight"),
    ],
)
def test_a_wrong_type_or_range_is_named_with_its_field(tmp_path, old, new, field):
    assert field in error(tmp_path, RECIPE.replace(old, new))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1e3), ("-2.5e+1", -25.0), (".5e1", 5.0), ("0.001", 1e-3), ("3", 3.0)],
)
def test_a_number_in_any_notation_is_a_float(tmp_path, text, value):
    loaded = recipe.load(write(tmp_path, RECIPE + f"seed: 0\ntrain: {{lr: {text.lstrip('-')}}}\n"))
    assert loaded.train.lr == abs(value)


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just words\n", "a: [\n", "!!python/object:os.system {}\n"]
)
def test_what_is_no_mapping_is_a_users_error(tmp_path, text):
    with pytest.raises(EdgeclipError):
        recipe.load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EdgeclipError, match=r"nothing\.yaml: there is no such file"):
        recipe.load(tmp_path / "nothing.yaml")


def test_an_unknown_word_offers_the_nearest(tmp_path):
    said = error(tmp_path, RECIPE + "train: {device: cudaa}\n")
    assert "train.device: unknown value 'cudaa'; did you mean 'cuda'?" in said


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(EdgeclipError, match=r"cannot be read \(Is a directory\); give a text file"):
        recipe.load(tmp_path)


def test_a_repeated_key_is_refused(tmp_path):
    assert "seed" in error(tmp_path, RECIPE + "seed: 1\nseed: 2\n")


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(EdgeclipError, match="did you mean 'onnx-int8'"):
        target.load("onnx-int9")
    with pytest.raises(EdgeclipError, match="did you mean 'host-cpu'"):
        device.load("host-cpuu")


def test_a_working_folder_may_bring_its_own(tmp_path, monkeypatch):
    (tmp_path / "devices").mkdir()
    write(tmp_path / "devices", "runtimes: [onnxruntime]\nthreads: 3\n", "mine.yaml")
    monkeypatch.chdir(tmp_path)
    name, loaded = device.load("mine")
    assert name == "mine"
    assert loaded.threads == 3
    assert "host-cpu" in config.shipped("device")


def test_a_device_that_is_not_this_machine_is_refused():
    here = device.require_here("any", device.Device(runtimes=["onnxruntime"]))
    assert (
        device.require_here(
            "own", device.Device(runtimes=[], recognize=device.Recognize(arch=here.arch))
        )
        is not None
    )
    with pytest.raises(EdgeclipError, match=r"other: .*not that device"):
        device.require_here(
            "other", device.Device(runtimes=[], recognize=device.Recognize(arch="vax"))
        )


def test_structs_are_frozen(tmp_path):
    loaded = recipe.load(write(tmp_path, RECIPE))
    with pytest.raises(AttributeError):
        loaded.seed = 3


def test_calibration_belongs_to_int8_only(tmp_path):
    limits = "tolerance: {centered_cosine_p1: 0.9, top1_agreement: 0.9, accuracy_drop_pp: 1}"
    for text in ("precision: int8", "precision: fp32\ncalibration: {}"):
        with pytest.raises(EdgeclipError, match="calibration"):
            target.load(
                str(
                    write(tmp_path, f"runtime: onnxruntime\nactivations: uint8\n{text}\n{limits}\n")
                )
            )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            "runtime: onnxruntime\nprecision: int8\nactivations: uint8\ncalibration: {}",
            "reduce_range: belongs to activations: uint8",
        ),
        (
            "runtime: onnxruntime\nprecision: int8\nactivations: int8\nreduce_range: always\ncalibration: {}",
            "reduce_range: belongs to activations: uint8",
        ),
        (
            "runtime: tensorrt\nprecision: fp8\ntext: fp16\ncalibration: {}",
            "opset 18 has neither fp8 nor",
        ),
        (
            "runtime: openvino\nprecision: fp8\nopset: 19\ncalibration: {}",
            "openvino bundles have no precision fp8",
        ),
        (
            "runtime: onnxruntime\nprecision: int8\nactivations: int8\ncalibration: {layers: [all, residual]}",
            "layers: residual belongs to openvino",
        ),
        (
            "runtime: openvino\nprecision: fp16\ntext: fp16",
            "optimization_agreement: belongs to onnxruntime",
        ),
    ],
)
def test_fields_of_a_target_that_do_not_go_together_are_refused(tmp_path, fields, what):
    limits = "tolerance: {centered_cosine_p1: 0.9, top1_agreement: 0.9, accuracy_drop_pp: 1"
    limits += ", optimization_agreement: 0.9}" if "optimization" in what else "}"
    with pytest.raises(EdgeclipError, match=what):
        target.load(str(write(tmp_path, f"{fields}\n{limits}\n")))


def test_a_rule_of_a_struct_is_told_at_its_path(tmp_path):
    class Part(config.Config):
        count: int = 0

        def __post_init__(self):
            if self.count > 3:
                raise config.BrokenRule("count", "is too large", "lower it")

    class Whole(config.Config):
        parts: tuple[Part, ...] = ()

    with pytest.raises(EdgeclipError) as e:
        config.convert({"parts": [{"count": 1}, {"count": 4}]}, Whole, "r.yaml")
    assert str(e.value) == "r.yaml: parts[1].count: is too large; lower it"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("licence: CC0", "licence: was renamed to `license`"),
        ("max_pictures: 3", "max_pictures: was renamed to `max_images`"),
        ("centre_texts: true", "centre_texts: was renamed to `center_texts`"),
        ("unlabelled: 0.1", "unlabelled: was renamed to `unlabeled`"),
        ("distill: {quantize: onnx-int8}", r"distill: was renamed to `qat: \{target: NAME\}`"),
        ("train: {first: {}}", r"train\.first: was renamed to `train\.pretrain`"),
    ],
)
def test_a_recipe_in_the_words_of_0_1_is_told_the_new_one(tmp_path, text, says):
    with pytest.raises(EdgeclipError, match=says):
        recipe.load(write(tmp_path, f"{text}\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calibration: {pictures: 9}", r"calibration\.pictures: was renamed to `images`"),
        (
            "tolerance: {centred_cosine_p1: 0.9}",
            r"tolerance\.centred_cosine_p1: was renamed to `centered_cosine_p1`",
        ),
        (
            "tolerance: {optimisation_agreement: 0.9}",
            r"tolerance\.optimisation_agreement: was renamed to `optimization_agreement`",
        ),
    ],
)
def test_a_target_in_the_words_of_0_1_is_told_the_new_one(tmp_path, text, says):
    with pytest.raises(EdgeclipError, match=says):
        target.load(str(write(tmp_path, f"{text}\n")))


def test_a_device_in_the_words_of_0_1_is_told_the_new_one(tmp_path):
    with pytest.raises(EdgeclipError, match="recognise: was renamed to `recognize`"):
        device.load(str(write(tmp_path, "recognise: {arch: x86_64}\n")))
    with pytest.raises(EdgeclipError, match="memory_bandwidth_gb_s: is not used any more"):
        device.load(str(write(tmp_path, "memory_bandwidth_gb_s: 10\n")))


def test_every_new_word_is_a_field_that_somebody_reads():
    """A table that names a field nobody has would send the user from one error to the next."""
    from edgeclip.device import bench_report, manifest, records
    from edgeclip.device.zero_shot import EduAttention
    from edgeclip.host import recipe as recipes

    known = set(EduAttention._fields)
    for module in (
        manifest,
        records,
        bench_report,
        target,
        device,
        recipes,
        recipes.ingredients,
        recipes.training,
    ):
        for found in vars(module).values():
            known.update(getattr(found, "__struct_fields__", ()))
    assert set(config.RENAMED.values()) <= known


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("train: {lr: NUMBER}", "train.lr"),
        ("losses: {kl: {temperature: NUMBER}}", "losses.kl.temperature"),
        ("bench: {min_duration_s: NUMBER}", "bench.min_duration_s"),
        ("views: {scale: [0.5, NUMBER]}", "views.scale.1"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_where_it_stands(tmp_path, number, field, path):
    whole = tmp_path / "r.yaml"
    whole.write_text("data: {kind: openmoji}\n" + field.replace("NUMBER", number) + "\n")
    with pytest.raises(EdgeclipError, match=rf"{re.escape(path)}: is .*finite"):
        config.load(whole, recipe.Recipe)

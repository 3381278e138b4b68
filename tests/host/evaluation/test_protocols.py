"""`edgeclip evaluate` on a run whose teacher is right: it sees colors, and its texts name them."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip import config, disk
from edgeclip.cli import run as cli_run
from edgeclip.device.images import ImageRef
from edgeclip.device.metrics import harmonic_mean, hits, l2_normalize
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.zero_shot import EduAttention, class_scores
from edgeclip.host import recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.data import EvaluationSet
from edgeclip.host.evaluation.scores import Answers, score
from edgeclip.reports.results import MODELS, PROTOCOLS
from tests.support.command import mistake, run
from tests.support.files import snapshot
from tests.support.images import add_member, encoded

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
}
RECIPE = """
data: {kind: webdataset, name: paint, root: paint}
adapt_data: {kind: webdataset, name: cars, root: cars}
shifts:
  - {kind: webdataset, name: night, root: night, train: null}
teacher: {kind: conse}
adapt: {kind: residual_head, hidden: 8, steps: 5, batch_size: 8, lr: 1e-4}
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}
losses: {kl: {weight: 1}, edu_attention: {}}
train: {warmup_steps: 3, epochs: 1, batch_size: 8, device: cpu}
"""


STUDENT = {"tower": {"kind": "timm", "model": "x", "weights": "random", "image_size": 32}}


class MeanColor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        mean = self.scale * pixels.mean(dim=(2, 3))
        return torch.cat([mean, mean], dim=1)  # pooled | feature


def color_teacher(spec, options):
    def encode_text(texts):
        names = [next(c for c in COLORS if c in t) for t in texts]
        return torch.from_numpy(
            l2_normalize(np.array([COLORS[n] for n in names], np.float32) / 127.5 - 1)
        )

    return teachers.Teacher(
        name="mean color",
        license="none",
        identity={"kind": "mean color"},
        preprocess=Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3),
        logit_scale=20.0,
        embed_dim=3,
        tower=MeanColor().eval(),
        features=lambda rows: rows[:, -3:],
        encode_text=encode_text,
    )


def write_set(root, classes, train=4, test=3, dark=0, captions=True):
    for part, count in (("train", train), ("test", test)):
        (root / part).mkdir(parents=True)
        with tarfile.open(root / part / "0.tar", "w") as tar:
            for i in range(count * len(classes)):
                name = classes[i % len(classes)]
                image = Image.new(
                    "RGB", (20, 20), tuple(max(0, c - dark - i) for c in COLORS[name])
                )
                add_member(tar, f"{i:03d}.png", encoded(image))
                add_member(tar, f"{i:03d}.cls", str(i % len(classes)).encode())
                if captions:
                    add_member(tar, f"{i:03d}.txt", f"something {name}".encode())
    (root / "classnames.txt").write_text("\n".join(classes) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c} thing\n{c}\n")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A finished run: adapted on `cars`, distilled on `paint`, with the shift `night` of three of
    paint's classes in another order.
    """
    folder = tmp_path_factory.mktemp("protocols")
    write_set(folder / "paint", list(COLORS))
    write_set(folder / "cars", ["white", "red", "blue"])
    write_set(folder / "night", ["yellow", "red", "green"], dark=60)
    write_set(folder / "mute", ["red", "blue"], captions=False)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "words.yaml").write_text("data: {kind: csv, name: words, root: paint}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(teachers, "load", color_teacher)
        result = run("distill", "r.yaml", "--json")
        assert result.exit_code == 0, result.output
        yield folder, json.loads(result.stdout)


def evaluate(*arguments):
    result = run("evaluate", "runs/r", "--protocol", *arguments, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert disk.read_json(Path(record["report"])) == record
    return record


def test_the_command_knows_every_protocol():
    assert PROTOCOLS == cli_run.PROTOCOLS


def test_stage_1_reads_the_images_and_classes_of_adapt_data(workplace):
    folder, _ = workplace
    manifest = disk.read_manifest(folder / "runs/r/teacher", "adapted teacher")
    rows = disk.read_manifest(folder / "cache" / manifest["cache"], "teacher cache")["shards"]
    assert sum(s["rows"] for s in rows) == 12 and np.load(
        folder / "cache" / manifest["cache"] / "class_features.npy"
    ).shape == (3, 3)
    assert (
        len(list((folder / "cache").glob(f"*/{disk.MANIFEST}"))) == 2
    )  # and the student's, of paint


def test_distill_scores_shifts_beside_its_own_set(workplace):
    _, results = workplace
    paint, night = results["sets"]
    assert (paint["name"], paint["classes"], paint["images"]) == ("paint test", 6, 18) and paint[
        "note"
    ].startswith("transductive: ")
    assert (night["name"], night["classes"], night["images"]) == (
        "night",
        3,
        9,
    ) and "not transductive" in night["note"]
    assert (
        paint["teacher"]["top1"] == night["teacher"]["top1"] == 1.0
    )  # classes are matched by name: their order differs
    assert (
        paint["student_attending_all_classes"] is None
        and night["student_attending_all_classes"] is not None
    )


def test_zero_shot_on_the_runs_own_set_repeats_what_distill_found(workplace):
    _, results = workplace
    (row,) = evaluate("zero_shot")["sets"]
    for model in MODELS:
        assert row.get(model) == results["sets"][0].get(model)
    assert row["chance_top1"] == row["own_list_chance_top1"] == 1 / 6 and row["templates"] == 2
    assert row["transductive"] and "adapted on no label of it" in row["note"]


def test_zero_shot_on_a_folder_has_class_features_from_its_own_words_and_prompts(workplace):
    folder, _ = workplace
    record = evaluate("zero_shot", "--data", "cars")
    (row,) = record["sets"]
    assert row["teacher"]["top1"] == 1.0
    assert (row["classes"], row["images"]) == (3, 9)
    assert "text encoder" in record["text_side"]
    # Stage 1's own images, under another name than the run's data: their bytes say so.
    assert row["overlap"]["identical"] == 9 and row["transductive"]
    assert "adapted on labels of its training images" in row["note"]
    (folder / "night.yaml").write_text(
        "data: {kind: webdataset, name: evening, root: night, train: null, templates: ['{c}']}\n"
    )
    (row,) = evaluate("zero_shot", "--data", "night.yaml")["sets"]
    assert row["teacher"]["top1"] == 1.0
    assert row["templates"] == 1
    assert not row["transductive"]


def test_base_to_novel_scores_each_half_over_all_labels_and_within_itself(workplace):
    record = evaluate("base_to_novel")
    base, novel = record["sets"]
    sizes = [(s["name"], s["labels"], s["classes"], s["images"]) for s in (base, novel)]
    assert sizes == [("base", 6, 3, 9), ("novel", 6, 3, 9)]
    assert {s["chance_top1"] for s in (base, novel)} == {1 / 6}
    assert {s["own_list_chance_top1"] for s in (base, novel)} == {1 / 3}
    assert record["harmonic_mean"]["teacher"] == 1.0
    for model in ("student", "student_without_edu_attention", "student_attending_all_classes"):
        for prefix in ("", "own_list_"):
            expected = harmonic_mean(base[model][f"{prefix}top1"], novel[model][f"{prefix}top1"])
            assert record[f"{prefix}harmonic_mean"][model] == expected


def test_no_figure_over_all_labels_is_above_the_one_within_the_own_list(workplace):
    for s in evaluate("base_to_novel")["sets"]:
        plain = s["student_without_edu_attention"]
        assert plain["top1"] <= plain["own_list_top1"]
        assert plain["top5"] <= plain["own_list_top5"]


def test_cross_dataset_is_one_table_with_the_average(workplace):
    record = evaluate("cross_dataset", "--data", "paint", "--data", "other=night")
    assert [s["of"] for s in record["sets"]] == ["paint", "other"] and [
        s["transductive"] for s in record["sets"]
    ] == [True, False]
    assert record["average"]["student"] == pytest.approx(
        np.mean([s["student"]["top1"] for s in record["sets"]])
    )
    assert record["report"].endswith("evaluate-cross_dataset-paint+other.json")
    assert (
        "average top-1 accuracy over all labels, student: "
        in run("evaluate", "runs/r", "--protocol", "cross_dataset").stdout
    )


def test_domain_generalization_averages_over_the_shifts_only(workplace):
    record = evaluate("domain_generalization")
    assert [(s["name"], s["shift"]) for s in record["sets"]] == [
        ("paint test", False),
        ("night", True),
    ]
    assert record["average"]["student"] == record["sets"][1]["student"]["top1"]
    given = evaluate("domain_generalization", "--data", "night", "--data", "dusk=night")
    assert [s["name"] for s in given["sets"]] == ["paint test", "night", "dusk"]


def test_retrieval_counts_every_image_that_has_the_caption(workplace):
    record = evaluate("retrieval")
    (row,) = record["sets"]
    assert (row["images"], row["texts"]) == (18, 6)
    for way in ("image_to_text", "text_to_image"):
        assert row["teacher"][way]["r1"] == 1.0
    assert row["student"]["image_to_text"]["chance_r1"] == pytest.approx(1 / 6)
    assert row["student"]["text_to_image"]["chance_r1"] == pytest.approx(3 / 18)
    assert (
        "6 different captions" in row["note"]
        and "text to image" in run("evaluate", "runs/r", "--protocol", "retrieval").stdout
    )


def test_without_the_teachers_weights_its_column_is_not_measured(workplace, monkeypatch):
    from edgeclip.errors import EdgeclipError

    def missing(spec, options):
        raise EdgeclipError("weights", "they are gone", "find them")

    before = evaluate("zero_shot")["sets"][0]
    monkeypatch.setattr(teachers, "load", missing)
    record = evaluate("zero_shot")
    assert record["sets"][0]["teacher"] is None
    assert record["sets"][0]["student"] == before["student"]
    assert "they are gone" in record["teacher_missing"]
    assert "not measured" in run("evaluate", "runs/r", "--protocol", "zero_shot").stdout
    mistake("evaluate", "runs/r", "--protocol", "retrieval", says="they are gone", only_line=False)


def test_the_same_recipe_resumes_and_data_may_be_moved_by_name(workplace):
    folder, results = workplace
    assert json.loads(run("distill", "r.yaml", "--data", "night=night", "--json").stdout) == results
    asked = recipe.of_run(folder / "runs/r")
    assert recipe.roots(asked) == {
        "data": str(folder / "paint"),
        "adapt_data": str(folder / "cars"),
        "shifts.0": str(folder / "night"),
    }
    shutil.copytree(folder / "night", folder / "moved")
    assert recipe.load(folder / "r.yaml", ("night=moved",)).shifts[0].root == "moved"
    assert recipe.description(asked) == recipe.description(
        recipe.load(folder / "r.yaml", ("night=moved",))
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["retrieval", "--data", "mute"], "retrieval needs captions"),
        (["zero_shot", "--data", "nothing"], "no such folder"),
        (["zero_shot", "--data", "nothing.yaml"], "no such file"),
        (
            ["zero_shot", "--data", "words.yaml"],
            "--data words: is of kind csv, which nothing is evaluated on; name a set with a test part",
        ),
        (["domain_generalization", "--data", "paint"], "has no shift"),
        (["base_to_novel", "--data", "paint", "--data", "cars"], "takes one set"),
    ],
)
def test_a_set_that_lacks_what_the_protocol_needs(workplace, arguments, says):
    folder, _ = workplace

    def files():
        return {
            k: v for k, v in snapshot(folder).items() if not k.startswith("cache/index")
        }  # what tars hold, found once and kept

    before = files()
    mistake("evaluate", "runs/r", "--protocol", *arguments, says=says, only_line=False)
    assert files() == before


def test_a_shift_with_an_unknown_class_is_refused(workplace):
    folder, _ = workplace
    if not (folder / "odd").exists():
        write_set(folder / "odd", ["red", "blue"])
        (folder / "odd" / "classnames.txt").write_text("red\nbleu\n")
    message = mistake(
        "evaluate", "runs/r", "--protocol", "domain_generalization", "--data", "odd", says="'bleu'"
    )
    assert "did you mean 'blue'?" in message
    (folder / "odd.yaml").write_text(
        RECIPE.replace("name: night, root: night", "name: odd, root: odd")
    )
    mistake("distill", "odd.yaml", says="'bleu'", only_line=False)
    assert not (folder / "runs/odd").exists()


def test_adapt_data_without_stage_1_is_refused(workplace):
    folder, _ = workplace
    (folder / "no.yaml").write_text(
        RECIPE.replace(
            "adapt: {kind: residual_head, hidden: 8, steps: 5, batch_size: 8, lr: 1e-4}\n", ""
        )
    )
    mistake("distill", "no.yaml", says="adapt_data: is for stage 1")


def test_a_typo_inside_a_list_of_sets_is_named(workplace):
    folder, _ = workplace
    (folder / "typo.yaml").write_text(RECIPE.replace("night, root: night", "night, rooot: night"))
    mistake("distill", "typo.yaml", says="shifts.0.rooot: unknown field; did you mean 'root'?")


def test_every_reading_of_edu_attention_is_scored_once():
    """Against class_scores by hand: with, without, kept or not, over the active classes or all."""
    rng = np.random.default_rng(0)
    w, u = l2_normalize(rng.normal(size=(5, 8))), l2_normalize(rng.normal(size=(40, 8)))
    head = EduAttention(
        rng.normal(size=(8, 8)).astype(np.float32), np.zeros(8, np.float32), 3.0, 0.1
    )
    labels, active = rng.integers(0, 3, 40), [1, 3, 4]
    images = [ImageRef(str(i), "", label=active[label]) for i, label in enumerate(labels)]
    s, student = EvaluationSet("s", images, active, ""), Answers(np.arange(40), u, w)

    def r1(head, attended=None):
        return float(hits(class_scores(u, w[active], head, attended), labels).mean())

    kept, not_kept, none = (
        score(s, student, None, head, True),
        score(s, student, None, head, False),
        score(s, student, None, None, False),
    )
    assert (
        kept.student.own_list_top1 == not_kept.student_with_edu_attention.own_list_top1 == r1(head)
    )
    assert (
        kept.student_without_edu_attention.own_list_top1
        == not_kept.student.own_list_top1
        == none.student.own_list_top1
        == r1(None)
    )
    assert (
        kept.student_attending_all_classes.own_list_top1
        == not_kept.student_attending_all_classes.own_list_top1
        == r1(head, w)
    )
    assert kept.student_with_edu_attention is None
    assert none.student_attending_all_classes is None
    assert kept.teacher is None
    assert len({r1(head), r1(None), r1(head, w)}) > 1


def test_the_runs_student_is_what_is_scored(workplace):
    folder, results = workplace
    _, head, *_ = students.load(folder / "runs/r/student")
    features = np.load(folder / "runs/r/evaluation/image_features.npy")
    labels = np.array(disk.read_json(folder / "runs/r/evaluation/evaluation.json")["labels"])
    w = np.load(folder / "runs/r/student/class_features.npy")
    assert results["sets"][0]["student"]["top1"] == pytest.approx(
        hits(class_scores(features[:18], w, head.numpy()), labels[:18]).mean()
    )


def test_a_file_of_one_set_is_strict(tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("data: {kind: webdataset, name: a, root: b, tset: x}\n")
    with pytest.raises(
        config.EdgeclipError, match=r"data\.tset: unknown field; did you mean 'test'"
    ):
        config.load(path, recipe.DataFile)

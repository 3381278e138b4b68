"""results.json and the records of protocols: written and read again, and those of edgeclip 0.1
read as today's.
"""

import json

import msgspec
import pytest

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.reports import results as R

SET = R.SetScore(
    name="base",
    note="a note",
    images=40,
    labels=8,
    classes=4,
    chance_top1=0.125,
    own_list_chance_top1=0.25,
    student=R.Accuracy(top1=0.25, top5=0.5, own_list_top1=0.5, own_list_top5=0.75),
)
OLD_AS_TODAY = msgspec.structs.replace(
    SET,
    labels=None,
    chance_top1=None,
    student=R.Accuracy(top1=None, top5=None, own_list_top1=0.5, own_list_top5=0.75),
)
"""0.1 scored each set within its own class list alone"""
NET = R.Network(name="net", parameters=10, macs=20, input=64)
RESULTS = R.EvaluationResults(
    run="runs/r",
    data="toy",
    data_license="CC0",
    sets=(SET,),
    models=R.Models(teacher=NET, student=NET),
    log=({"epoch": 1, "loss": 0.5},),
    edu_attention=R.EduAttentionResult(alpha=0.25, kept=True),
    skipped=("a.jpg: broken",),
    device="cpu",
    processes=1,
    seconds={"data": 1.5},
    peak_memory_mib=100,
)
RECALL = R.Recall(r1=0.1, r5=0.2, r10=0.3, chance_r1=0.01, chance_r5=0.05, chance_r10=0.1)
WAYS = R.BothWays(image_to_text=RECALL, text_to_image=RECALL)
HEAD = {
    "run": "runs/r",
    "student": "0" * 64,
    "teacher": None,
    "teacher_missing": "its weights are gone",
    "edu_attention": None,
    "text_side": "its own",
    "report": "x.json",
}
ACCURATE = R.AccuracyRecord(
    protocol="zero_shot", sets=(SET,), average=R.ModelScores(student=0.5), **HEAD
)
RETRIEVED = R.RetrievalRecord(
    protocol="retrieval",
    sets=(
        R.RetrievalScore(
            name="shop",
            of="shop",
            note="",
            transductive=False,
            images=9,
            texts=8,
            teacher=None,
            student=WAYS,
        ),
    ),
    **HEAD,
)
OLD_SET = {
    "name": "base",
    "note": "a note",
    "pictures": 40,
    "classes": 4,
    "chance_r1": 0.25,
    "teacher": None,
    "student": {"r1": 0.5, "r5": 0.75},
}


def finished(run):
    with disk.new_folder(run) as folder:
        disk.write_manifest(folder, "run", {})
    return run


def old_results():
    value = msgspec.to_builtins(RESULTS)
    del value["format"], value["data_license"], value["own_list_harmonic_mean"]
    value |= {"data_licence": "CC0", "sets": [OLD_SET], "harmonic_mean": {"student": 0.5}}
    value["log"] = [{"epoch": 1, "loss": 0.5, "first_features": 0.25}]
    value["seconds"] = {"data": 1.5, "waiting for pictures": 2.0, "optimiser": 3.0}
    return value


def test_results_are_read_as_they_were_written(tmp_path):
    run = finished(tmp_path / "r")
    R.write_results(run, RESULTS)
    assert R.read_results(run) == RESULTS
    written = json.loads((run / "results.json").read_text())
    assert written["format"] == 2
    assert written["sets"][0]["teacher"] is None
    assert written["log"] == [{"epoch": 1, "loss": 0.5}]


@pytest.mark.parametrize("record", [ACCURATE, RETRIEVED])
def test_a_protocol_is_read_as_it_was_written(tmp_path, record):
    path = tmp_path / "reports" / f"evaluate-{record.protocol}-toy.json"
    R.write_protocol(path, record)
    assert R.read_protocol(path) == record
    assert R.read_protocols(tmp_path) == [record]


def test_results_of_the_first_format_have_todays_names(tmp_path):
    run = finished(tmp_path / "r")
    disk.write_json(run / "results.json", old_results())
    results = R.read_results(run)
    assert results.format == 2
    assert results.sets == (OLD_AS_TODAY,)
    assert results.harmonic_mean is None
    assert results.own_list_harmonic_mean == R.ModelScores(student=0.5)
    assert results.data_license == "CC0"
    assert results.log[0] == {"epoch": 1, "loss": 0.5, "pretrain_features": 0.25}
    assert results.seconds == {"data": 1.5, "waiting for images": 2.0, "optimizer": 3.0}


def test_protocols_of_the_first_format_have_todays_names(tmp_path):
    path = tmp_path / "evaluate.json"
    disk.write_json(path, HEAD | {"protocol": "domain_generalisation", "sets": [OLD_SET]})
    record = R.read_protocol(path)
    assert record.protocol == "domain_generalization"
    assert record.sets == (OLD_AS_TODAY,)
    (row,) = msgspec.to_builtins(RETRIEVED)["sets"]
    row["pictures"] = row.pop("images")
    disk.write_json(path, HEAD | {"protocol": "retrieval", "sets": [row]})
    assert R.read_protocol(path) == RETRIEVED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 3}, "has format 3, and this edgeclip reads formats 1 and 2"),
        ({"data": None}, "Expected `str`, got `null` - at `$.data`"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path, change, says):
    run = finished(tmp_path / "r")
    disk.write_json(run / "results.json", msgspec.to_builtins(RESULTS) | change)
    with pytest.raises(EdgeclipError) as e:
        R.read_results(run)
    assert says in str(e.value)
    assert "results.json" in str(e.value)


def test_an_unfinished_run_has_no_results(tmp_path):
    disk.write_json(tmp_path / "results.json", msgspec.to_builtins(RESULTS))
    with pytest.raises(EdgeclipError, match="no finished run"):
        R.read_results(tmp_path)

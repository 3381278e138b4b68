"""The report says ship or do not ship and why, from what was measured and nothing else, on one
page without a network.
"""

import io
import re
import tarfile

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.boards.waterfall import Stage, summary
from edgeclip.device.intervals import harmonic_mean_limits
from edgeclip.device.records import ChangedImage, ClassAccuracy
from edgeclip.errors import EdgeclipError
from edgeclip.reports import history
from edgeclip.reports.html import report
from edgeclip.reports.targets import collect
from tests.support.finished_run import SCORES, make_run
from tests.support.images import encoded, toy_image
from tests.support.manifests import candidate_row, search_record
from tests.support.optional import require
from tests.support.reports import host_bench as bench
from tests.support.reports import host_parity as parity

PROTOCOL = {
    "format": 2,
    "run": "r",
    "student": "this student",
    "teacher": None,
    "teacher_missing": "its tower is not at hand",
    "edu_attention": None,
    "report": "r/reports/evaluate.json",
}


def test_the_page_needs_no_network_and_runs_no_script(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    path, verdicts = report(make_run(tmp_path / "run"))
    page = path.read_text(encoding="utf-8")
    assert next(iter(verdicts.values())).startswith("ship: ")
    without_names = re.sub(
        r"""\sxmlns(:\w+)?\s*=\s*("[^"]*"|'[^']*')|<!DOCTYPE[^>]*>|<!doctype[^>]*>""", "", page
    )
    without_metadata = re.sub(r"<metadata>.*?</metadata>", "", without_names, flags=re.DOTALL)
    assert not re.findall(r"https?://", without_metadata)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", without_metadata)
    assert page.count("<svg") >= 2


def test_what_was_not_measured_says_so_and_texts_are_escaped(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    page = report(make_run(tmp_path / "run"))[0].read_text(encoding="utf-8")
    assert "not measured" in page
    assert "a &lt;note&gt; &amp; more" in page
    assert "&lt;script&gt;alert(1)" in page
    assert re.search("<td[^>]*>2.25</td>", page) and not re.search("<td[^>]*>None</td>", page)


def test_a_recipe_that_was_changed_since_is_not_shown_as_the_runs(tmp_path):
    run = make_run(tmp_path / "run")
    digest = disk.sha256(run / "recipe.yaml")
    disk.write_json(run / disk.MANIFEST, {"kind": "run", "recipe_file": digest})
    report(run)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(EdgeclipError, match=r"recipe.yaml: was changed since the run was made"):
        report(run)


def test_every_reading_and_every_protocol_of_this_student_is_on_the_page(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run")
    results = disk.read_json(run / "results.json")
    results["sets"][0] |= {
        "student_own_text": SCORES | {"top1": 0.3125, "top5": 0.4},
        "teacher": None,
    }  # of a teacher without a tower at hand
    results["models"]["teacher"] |= {"parameters": None, "macs": None}
    disk.write_json(run / "results.json", results)
    row = {
        "name": "night",
        "of": "night",
        "note": "a shift",
        "images": 9,
        "labels": 6,
        "classes": 3,
        "chance_top1": 1 / 6,
        "own_list_chance_top1": 1 / 3,
        "teacher": None,
        "student": SCORES | {"top1": 0.8765, "top5": 1.0},
    }
    record = PROTOCOL | {
        "protocol": "zero_shot",
        "sets": [row],
        "text_side": "the teacher's",
        "average": {"student": 0.765},
        "own_list_average": {"student": 0.8},
    }
    disk.write_json(run / "reports" / "evaluate-zero_shot-night.json", record)
    disk.write_json(
        run / "reports" / "evaluate-zero_shot-old.json",
        record | {"student": "another", "sets": [row | {"name": "stale"}]},
    )
    page = report(run)[0].read_text(encoding="utf-8")
    assert "student with its own text tower" in page and ">0.312</td>" in page
    assert "Protocol: zero shot" in page
    assert ">0.876</td>" in page
    assert ">0.765</td>" in page
    assert "stale" not in page
    assert ">not measured</td>" in page


def test_retrieval_is_on_the_page_both_ways(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run")
    way = {
        "r1": 0.1875,
        "r5": 0.5,
        "r10": 0.75,
        "chance_r1": 0.02,
        "chance_r5": 0.1,
        "chance_r10": 0.2,
    }
    row = {
        "name": "shop",
        "of": "shop",
        "note": "captions",
        "transductive": False,
        "images": 9,
        "texts": 8,
        "teacher": None,
        "student": {"image_to_text": way, "text_to_image": way},
    }
    disk.write_json(
        run / "reports" / "evaluate-retrieval-shop.json",
        PROTOCOL | {"protocol": "retrieval", "sets": [row], "text_side": "own"},
    )
    page = report(run)[0].read_text(encoding="utf-8")
    recalls = '>0.188</td><td data-label="R@5">0.500</td><td data-label="R@10">0.750</td>'
    assert page.count(recalls) == 2 and "text to image" in page


def test_a_run_without_any_report_does_not_ship(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    _, verdicts = report(make_run(tmp_path / "run", reports=False))
    assert verdicts == {"t": "cannot say: not validated; not benchmarked"}


def test_a_report_of_another_bundle_does_not_count(tmp_path):
    run = make_run(tmp_path / "run")
    disk.write_record(run / "reports" / "t.host-cpu.parity.json", parity(bundle="0" * 64))
    (row,) = collect(run)
    assert row.parity is None
    assert row.bench is not None
    assert "not validated" in row.verdict


def test_the_history_of_an_engine_is_no_report(tmp_path):
    run = make_run(tmp_path / "run")
    disk.write_json(run / "reports" / "t.host-cpu.engines.json", [{"engine": "k1"}])
    assert [r.verdict[:5] for r in collect(run)] == ["ship:"]


def test_a_bundle_of_an_older_edgeclip_is_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "bundles" / "t" / disk.MANIFEST
    manifest = disk.read_json(path)
    for change, says in (
        ({"quantization": {"frontier": []}}, "missing required field `method`"),
        ({"format": 0}, "is of format 0"),
    ):
        disk.write_json(path, manifest | change)
        with pytest.raises(EdgeclipError, match=says):
            collect(run)


def test_each_device_has_its_own_line(tmp_path):
    run = make_run(tmp_path / "run")
    digest = disk.sha256(run / "bundles" / "t" / disk.MANIFEST)
    disk.write_record(
        run / "reports" / "t.board.parity.json", parity(bundle=digest, device="board")
    )
    rows = {r.device: r.verdict for r in collect(run)}
    assert rows["host-cpu"].startswith("ship") and rows["board"] == "cannot say: not benchmarked"


def test_the_steps_are_on_the_page_with_their_sentence(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run", reports=False)
    digest = disk.sha256(run / "bundles" / "t" / disk.MANIFEST)
    rng = np.random.default_rng(0)
    stages = [Stage(name, rng.random(400) < 0.7, None) for name in ("teacher", "student", "int8")]
    found = summary(stages, None)
    report_of = parity(bundle=digest, waterfall=found)
    disk.write_record(run / "reports" / "t.host-cpu.parity.json", report_of)
    page = report(run)[0].read_text(encoding="utf-8")
    assert found.most in page
    for step in (*found.steps, found.whole):
        cells = [step.name, f"{step.top1:.4f}", step.lost, step.won, f"{step.drop_pp:.2f}"]
        assert re.search("".join(f"<td[^>]*>{re.escape(str(c))}</td>" for c in cells), page)
    assert "What each step lost of the one before it" in page


def test_the_same_run_gives_the_same_page(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run")
    first = report(run)[0].read_bytes()
    assert report(run)[0].read_bytes() == first


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_report_with_a_value_that_is_not_finite_is_one_line(tmp_path, value):
    run = make_run(tmp_path / "run")
    path = run / "reports" / "t.host-cpu.parity.json"
    text = path.read_text().replace('"drop_pp": 0.25', f'"drop_pp": {value}')
    assert value in text
    path.write_text(text)
    with pytest.raises(EdgeclipError, match=f"{value} is no number of JSON"):
        report(run)


def test_an_unfinished_run_is_a_users_error(tmp_path):
    run = make_run(tmp_path / "run")
    (run / disk.MANIFEST).unlink()
    with pytest.raises(EdgeclipError, match="no finished run"):
        report(run)


def test_every_form_that_was_tried_is_listed_and_those_that_were_timed_are_drawn(tmp_path):
    run = make_run(tmp_path / "r")
    row = candidate_row(smoothing=0.5, layers="dense")
    rejected = row | {
        "smoothing": None,
        "latency_ms": None,
        "verdict": "centered cosine p1 0.5, below 0.9",
    }
    quantization = search_record(frontier=[row, rejected])
    folder = run / "bundles" / "t"
    manifest = disk.read_json(folder / disk.MANIFEST)
    disk.write_json(folder / disk.MANIFEST, manifest | {"quantization": quantization})
    page = report(run)[0].read_text()
    assert (
        "minmax, dense layers, smoothing 0.5, 3 in float" in page
        and "centered cosine p1 0.5, below 0.9" in page
    )
    assert "the star was chosen" in page and page.count("not measured") >= 2


def test_the_page_shows_what_was_lost_and_which_classes(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run", reports=False)
    digest = disk.sha256(run / "bundles" / "t" / disk.MANIFEST)
    hostile = "<b>" + "x" * 300 + "\x1b[31m"
    row = ClassAccuracy(
        name=hostile,
        lower_pp=-1.5,
        drop_pp=2.5,
        upper_pp=6.25,
        lost=1,
        won=0,
        images=40,
        reference_top1=0.75,
        bundle_top1=0.725,
        confused_with="pear",
        confused=7,
    )
    lost = ChangedImage(0, hostile, hostile, "pear", 0.5, 0.625)
    won = ChangedImage(1, "pear", "dog", "pear", 0.25, 0.375)
    gone = ChangedImage(99, "pear", "dog", "pear", 0.25, 0.375)
    report_of = parity(bundle=digest, classes=[row], classes_of_few=3, changed=[lost, won, gone])
    (run / "evaluation").mkdir()
    with tarfile.open(run / "evaluation" / "images.tar", "w") as tar:
        for i in range(2):
            content = encoded(toy_image(i), "PNG")
            member = tarfile.TarInfo(f"{i:06d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    disk.write_record(run / "reports" / "t.host-cpu.parity.json", report_of)
    history.remember(run / "reports" / "t.host-cpu.history.json", report_of, "2026-01-01T00:00:00")
    history.remember(run / "reports" / "t.host-cpu.history.json", bench(), "2026-01-02T00:00:00")
    path, _ = report(run)
    page = path.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2
    assert "3 others have fewer than 30 unseen images" in page
    assert "-1.50 to 6.25" in page and "pear (7)" in page
    before_json, _, figures = page.partition("Every figure above, as JSON")
    assert "<b>xxx" not in page and "\x1b" not in page
    assert "x" * 61 not in before_json and "x" * 300 in figures
    assert "2026-01-02T00:00:00" in page
    assert len(page) < 3 << 20


def test_the_harmonic_mean_has_limits_where_there_are_halves(tmp_path):
    require("matplotlib", "pip install 'edgeclip[train]'")
    run = make_run(tmp_path / "run")
    path, _ = report(run)
    assert "harmonic mean" not in path.read_text(encoding="utf-8")
    results = disk.read_json(run / "results.json")
    halves = {"halves": ["base", "novel"], "harmonic_mean": {"student": 0.5}}
    disk.write_json(run / "results.json", results | halves)
    path, _ = report(run)
    low, high = harmonic_mean_limits((20, 40), (20, 40))
    assert f"0.500, 95 % limits {low:.3f} to {high:.3f}" in path.read_text(encoding="utf-8")

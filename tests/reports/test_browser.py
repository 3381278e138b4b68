"""The page in a real browser without a network: no error, every figure that of the JSON, nothing
cut off.
"""

import html.parser
import json
import shutil
import subprocess

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.boards.waterfall import Stage, summary
from edgeclip.device import rules
from edgeclip.device.load import summary as latency
from edgeclip.device.per_class import Answered
from edgeclip.device.per_class import shown as name_shown
from edgeclip.device.records import Earlier, Rule
from edgeclip.device.slices import Slices, per_slice
from edgeclip.reports import answers
from edgeclip.reports.earlier import sentence
from edgeclip.reports.html import report, side_by_side
from edgeclip.reports.tables import ANSWERS
from tests.support.finished_run import make_run
from tests.support.optional import require
from tests.support.reports import host_bench as bench
from tests.support.reports import host_parity as parity

CHROMIUM = shutil.which("chromium")


class Cells(html.parser.HTMLParser):
    """The text of every table, row by row."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "td":
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def browse(*arguments: str) -> subprocess.CompletedProcess:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt install chromium")
    alone = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    log = ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *alone, *log, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def slices_and_earlier(rng) -> tuple[Slices, Earlier]:
    """Slices of 400 images, one with a name that is no word, and the report before."""
    names = [[f"camera: {i % 3}", "short side below 224 px"][: 1 + i % 2] for i in range(380)]
    names += [["camera: <img src=x onerror=alert(1)>\x1b[31m" + "x" * 300]] * 12 + [[]] * 8
    after = (rng.random(400) < 0.1).astype(int)
    digests = [f"{i:016x}" for i in range(400)]
    none = np.zeros(400, int)
    score = np.full(400, 0.5)
    now = Answered(np.arange(400), none, none, after, score, score, digests, names)
    later = answers.of(parity(bundle="1" * 64), now, ["cat", "dog"], "2026-02-01T00:00:00+00:00")
    was = now._replace(
        after=(rng.random(400) < 0.15).astype(int), digests=[*digests[:390], *map(str, range(10))]
    )
    then = answers.of(parity(bundle="0" * 64), was, ["cat", "dog"], "2026-01-01T00:00:00+00:00")
    return per_slice(now), answers.paired(then, later)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A run with everything that a page can show."""
    require("matplotlib", "pip install 'edgeclip[train]'")
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder / "run", reports=False)
    digest = disk.sha256(run / "bundles" / "t" / disk.MANIFEST)
    rng = np.random.default_rng(0)
    stages = [Stage(name, rng.random(400) < 0.7, None) for name in ("teacher", "student", "int8")]
    held = Rule(rule=rules.LOST, unit="pp", allowed=1.0, found=0.25, low=-0.5, high=0.75, images=400, answer="holds")  # fmt: skip
    open_rule = Rule(rule=rules.CHANGED, unit="%", allowed=2.0, found=1.5, low=1.25, high=2.5, images=400, answer="cannot tell", needed=900)  # fmt: skip
    slices, earlier = slices_and_earlier(rng)
    of_parity = parity(
        bundle=digest,
        slices=list(slices.rows),
        slices_judged=slices.judged,
        slices_left_out=slices.left_out,
        earlier=earlier,
        waterfall=summary(stages, None),
        rules=[held, open_rule],
        verdict="cannot tell",
    )
    disk.write_record(run / "reports" / "t.host-cpu.parity.json", of_parity)
    disk.write_record(run / "reports" / "t.host-cpu.bench.json", bench(bundle=digest))
    path, _ = report(run)
    return path, of_parity


def test_the_browser_shows_what_the_json_says(page):
    path, of_parity = page
    done = browse("--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr and "ERR_" not in done.stderr
    rows = Cells(done.stdout).rows
    for rule in of_parity.rules:
        (row,) = [r for r in rows if r and r[0] == rule.rule]
        limits = f"{rule.low:.2f} to {rule.high:.2f}"
        assert row[1:4] == [ANSWERS[rule.answer], f"{rule.found:.2f} {rule.unit}", limits]
    for step in of_parity.waterfall.steps:
        (row,) = [r for r in rows if r and r[0] == step.name and len(r) == 7]
        assert row[1:5] == [
            f"{step.top1:.4f}",
            str(step.lost),
            str(step.won),
            f"{step.drop_pp:.2f}",
        ]
    for s in of_parity.slices:
        (row,) = [r for r in rows if r and r[0] == name_shown(s.name)]
        if s.drop_pp is None:
            assert row == [row[0], str(s.images), *[""] * 6, "unknown"]
            continue
        tops = [f"{s.reference_top1:.3f}", f"{s.bundle_top1:.3f}"]
        limits = f"{s.lower_pp:.2f} to {s.upper_pp:.2f}"
        assert row[1:8] == [str(s.images), *tops, str(s.lost), str(s.won), f"{s.drop_pp:.2f}", limits]  # fmt: skip
    found = of_parity.earlier
    (row,) = [r for r in rows if r and r[0] == found.when]
    assert row[1:4] == [found.bundle[:8], found.runtime, found.system]
    tops = [str(found.images), f"{found.top1_then:.4f}", f"{found.top1_now:.4f}"]
    limits = f"{found.lower_pp:.2f} to {found.upper_pp:.2f}"
    change = [str(found.lost), str(found.won), f"{found.drop_pp:.2f}", limits, f"{found.p:.4f}"]
    assert row[4:] == [*tops, *change]
    assert f"Paired {sentence(found)}." in html.unescape(done.stdout)
    figures = done.stdout.partition("Every figure above, as JSON</summary><pre>")[2]
    figures = html.unescape(figures.partition("</pre>")[0])
    shown = json.loads(figures)["t on host-cpu"]["parity"]
    assert shown == disk.read_json(path.parent / "reports" / "t.host-cpu.parity.json")


def test_slices_come_before_the_sets_and_the_report_before_comes_after(page):
    path, of_parity = page
    text = path.read_text(encoding="utf-8").partition("<body>")[2]
    titles = (
        "Slices of the unseen images",
        "Each evaluation set",
        "Against what was measured before",
    )
    places = [text.index(title) for title in (*titles, "Where it comes from")]
    assert places == sorted(places)
    assert f"Limits of {of_parity.slices_judged} slices at once" in text
    assert "<img src=x" not in text and "\x1b" not in text and "onerror=alert(1)&gt;" in text


def test_word_reason_and_next_step_come_first(page):
    path, _ = page
    text = path.read_text(encoding="utf-8").partition("<body>")[2]
    places = [text.index(x) for x in ("CANNOT SAY", "about 900 images", "Next:", "last measured")]
    places.append(text.index("What was asked of"))
    assert places == sorted(places)


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_screen(page, width, tmp_path):
    """A screenshot of the page as wide as it wants to be is no wider than the window."""
    path, _ = page
    probe = tmp_path / "probe.html"
    script = "<script>document.title = document.documentElement.scrollWidth</script>"
    probe.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"))
    done = browse(f"--window-size={width},900", "--dump-dom", probe.as_uri())
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert int(title) <= max(width, 500)  # the browser's window is never narrower


def test_print_has_everything_open_and_the_verdict_on_each_sheet(page, tmp_path):
    path, _ = page
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed: apt install poppler-utils")
    pdf = tmp_path / "page.pdf"
    browse(f"--print-to-pdf={pdf}", "--no-pdf-header-footer", path.as_uri())
    text = subprocess.run(["pdftotext", "-layout", str(pdf), "-"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    sheets = [s for s in text.split("\f") if s.strip()]
    assert len(sheets) > 1
    for sheet in sheets:
        assert "CANNOT SAY: t on host-cpu" in sheet
    assert "edgeclip distill" in text  # a folded part


def test_several_runs_stand_side_by_side(page, tmp_path):
    path, _ = page
    other = make_run(tmp_path / "other")
    both = side_by_side([path.parent, other])
    assert both.name == "report-run-other.html"
    rows = Cells(browse("--dump-dom", both.as_uri()).stdout).rows
    assert {"run: t on host-cpu", "other: t on host-cpu"} <= {row[0] for row in rows if row}


def test_a_latency_has_its_histogram():
    found = latency([0.001 * (1 + i / 100) for i in range(1000)])
    histogram = found.histogram
    assert sum(histogram.counts) + histogram.beyond == 1000
    assert histogram.low_ms == pytest.approx(1.0)
    assert histogram.high_ms == pytest.approx(np.percentile(np.arange(1000) / 100 + 1, 99))

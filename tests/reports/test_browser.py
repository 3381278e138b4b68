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
from edgeclip.device.records import Rule
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
    of_parity = parity(
        bundle=digest,
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
    figures = done.stdout.partition("Every figure above, as JSON</summary><pre>")[2]
    figures = html.unescape(figures.partition("</pre>")[0])
    shown = json.loads(figures)["t on host-cpu"]["parity"]
    assert shown == disk.read_json(path.parent / "reports" / "t.host-cpu.parity.json")


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

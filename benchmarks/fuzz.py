"""Does any file that a stranger gives end in a traceback, a hang, or all of the memory?

A target is the door of one kind of file: bytes go in, and only `EdgeclipError` may come out. Each
runs in a process of its own under atheris (libFuzzer), which keeps in the corpus what reaches new
branches of edgeclip's Python; decoders in C are seen from outside alone. Without atheris
(pip install atheris; it is no dependency) the seeds are mutated blindly, and the table says so.

    python benchmarks/fuzz.py            # 600 s a target, as in `make campaign`: 90 minutes
    python benchmarks/fuzz.py --seconds 60 --target tar --target yaml
    python benchmarks/fuzz.py --replay .data/fuzz/findings/tar-...    # one finding's traceback

A finding is an error of another type (told apart by its type and place), more than `TIMEOUT_S` for
one input, a process that ends, or more than `MEMORY_MIB`; its input is kept in the corpus's
`findings/`. Required: none.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import common
import compare
from fuzz_targets import TARGETS, Feed, mutated, scratch

TIMEOUT_S = 20
MEMORY_MIB = 3072
"""the largest image takes 1.1 GiB, twice"""
RESTARTS = 20
"""after a process that ended, within a target's time"""
SMOKE_S = 2.0
KEPT = Path(".data/fuzz")
"""the corpus, where no other is named; the smoke form keeps none"""


class Watched:
    """A target that keeps what it finds, and counts."""

    def __init__(self, name: str, findings: Path):
        self.name = name
        self.findings = findings
        self.feed: Feed = TARGETS[name].make(Path(scratch().name))
        self.executions = 0
        self.refused = 0
        self.state = findings / f"{name}.json"
        self.written = 0.0

    def __call__(self, content: bytes) -> None:
        from edgeclip.errors import EdgeclipError

        self.executions += 1
        try:
            self.feed(content)
        except EdgeclipError as e:
            self.refused += 1
            if "\n" in str(e):
                self.keep(content, "two-lines", str(e))
        except BaseException as e:  # Rust's panic is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            last = traceback.extract_tb(e.__traceback__)[-1]
            self.keep(
                content,
                f"{type(e).__name__}-{Path(last.filename).name}-{last.lineno}",
                "".join(traceback.format_exception(e)),
            )
        if time.monotonic() - self.written > 0.5:
            self.write()

    def keep(self, content: bytes, kind: str, why: str) -> None:
        path = self.findings / f"{self.name}-{kind}"
        if not path.exists():
            path.write_bytes(content)
            path.with_name(path.name + ".txt").write_text(why, encoding="utf-8", errors="replace")

    def write(self) -> None:
        """Write the counts: libFuzzer ends the process without a word."""
        self.written = time.monotonic()
        counts = {"executions": self.executions, "refused": self.refused}
        self.state.write_text(json.dumps(counts))


def one(name: str, seconds: float, folder: Path) -> None:
    """Run one target in this process; it does not return under atheris."""
    target = TARGETS[name]
    corpus = folder / name
    findings = folder / "findings"
    if importlib.util.find_spec("atheris") is None:
        watched = Watched(name, findings)
        blind(watched, seconds, corpus)
        watched.write()
        return

    import atheris

    with atheris.instrument_imports(include=["edgeclip", "PIL", "yaml", "tarfile"]):
        watched = Watched(name, findings)
    options = [
        f"-max_total_time={max(1, int(seconds))}",
        f"-timeout={TIMEOUT_S}",
        f"-report_slow_units={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={target.longest}",
        f"-artifact_prefix={findings}/{name}-native-",
        "-close_fd_mask=3",
        f"-seed={random.randrange(1, 2**31)}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], watched)
    atheris.Fuzz()


def blind(watched: Watched, seconds: float, corpus: Path) -> None:
    """Feed mutations of the corpus, without knowing what they reach."""
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]
    rng = random.Random(0)
    for seed in seeds:
        watched(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watched(mutated(rng.choice(seeds), rng, seeds)[: TARGETS[watched.name].longest])


def run(name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Return a target's counts, after so many seconds of it in processes of its own."""
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in TARGETS[name].seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    findings = folder / "findings"
    findings.mkdir(exist_ok=True)
    state = findings / f"{name}.json"
    totals = {"executions": 0, "refused": 0}
    end = time.monotonic() + seconds
    processes = 0
    while (left := end - time.monotonic()) > 0.5 and processes <= RESTARTS:
        state.unlink(missing_ok=True)
        processes += 1
        command = [sys.executable, __file__, "--one", name, "--seconds", str(left)]
        done = subprocess.run([*command, "--corpus", str(folder)], capture_output=True, text=True)
        if state.exists():
            for key, value in json.loads(state.read_text()).items():
                totals[key] += value
            state.unlink()
        if done.returncode == 0:
            break
        if not list(findings.glob(f"{name}-native-*")):  # it ended without an artifact
            path = findings / f"{name}-ended-{done.returncode}.txt"
            path.write_text(done.stderr[-5000:])
    kept = sorted(p.name for p in findings.glob(f"{name}-*") if p.suffix != ".txt")
    kept += sorted(p.name for p in findings.glob(f"{name}-ended-*"))
    return {**totals, "seconds": round(seconds, 1), "corpus": len(list(corpus.iterdir())),
            "processes": processes, "findings": kept}  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> None:
    here = common.this_machine()
    guided = importlib.util.find_spec("atheris") is not None
    figures: dict[str, Any] = {}
    required = []
    rows = []
    for name in options.target or TARGETS:
        found = run(name, options.seconds, folder)
        figures[name] = found
        required.append(compare.exact(f"findings: {name}", len(found["findings"]), at_most=0))
        rows.append(
            [name, f"{found['executions']:,}", f"{found['refused']:,}", found["corpus"],
             ", ".join(found["findings"]) or "none"]
        )  # fmt: skip
    common.table(rows, ["target", "executions", "refused", "inputs kept", "findings"])
    if not guided:
        print("blind mutations: atheris is not installed (pip install atheris)")
    figures = {"benchmark": "fuzz", "guided": guided, "targets": figures}
    common.finish(figures, required, here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, help="of each target  [default: 600; quick: 60]")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--corpus", type=common.absolute, help="folder that keeps the inputs")
    parser.add_argument("--replay", nargs="+", type=Path, help="feed these findings, and let fail")
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay:
        for path in options.replay:
            TARGETS[path.name.partition("-")[0]].make(Path(scratch().name))(path.read_bytes())
        return
    if options.one:
        one(options.one, options.seconds, options.corpus)
        return
    seconds = {common.WHOLE: 600.0, common.QUICK: 60.0, common.SMOKE: SMOKE_S}
    options.seconds = options.seconds or seconds[options.form]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="edgeclip-corpus-") as temporary:
        kept = Path(temporary) if options.form == common.SMOKE else KEPT.resolve()
        measure(options, options.corpus or kept)


if __name__ == "__main__":
    main()

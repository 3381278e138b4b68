"""The quickstart's accuracy over seeds: is the student's held-out accuracy the teacher's, or the
seed's luck?

For each seed a copy of recipes/quickstart.yaml that differs in `seed` alone is run by
`edgeclip.host.distill.run.distill` in a process of its own, into runs/quickstart-seed-N. The seed
moves the views, the adapted head and the student; the split of the concepts (`split_seed`) stays,
so every seed is asked the same held-out words. About four minutes a seed on two cores; the runs are
started afresh unless --reuse is given, which resumes or takes what lies there.

What bounds it: the teacher. The student is trained to agree with it on images whose words it has
never been told, so a ratio near 1 is all that distillation can promise, and the teacher's own
figure moves with the seed as well. With 478 held-out concepts the standard error of one top-1 is
about two points; teacher and student are scored on the same images, so their ratio is steadier than
either.

Required: the student's mean held-out top-1 over three seeds at least 0.95 of the teacher's mean;
its multiply-accumulates at most a sixth of the teacher's. --quick runs seed 0 only, which leaves
the first of them unjudged.

    python benchmarks/quickstart_seeds.py --check
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import compare
import toy

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
RUNS = Path("runs")
SEEDS = {"whole": (0, 1, 2), "quick": (0,), "smoke": (0,)}
HELD_OUT = "held-out concepts"
SETS = (HELD_OUT, "unlabeled concepts", "line drawings")
SHAPES = ("shapes test",)
"""of the toy"""
CHILD = (
    "import sys; from pathlib import Path; from edgeclip.host.distill.run import distill; "
    "distill(Path(sys.argv[1]), out=Path(sys.argv[2]), fresh=sys.argv[3] == 'fresh')"
)


def folder(seed: int, runs: Path = RUNS) -> Path:
    return runs / f"quickstart-seed-{seed}"


def with_seed(recipe: str, seed: int) -> str:
    """The recipe's text with its top-level seed set, and nothing else changed."""
    line = f"seed: {seed}"
    changed, found = re.subn(r"^seed:.*$", line, recipe, flags=re.MULTILINE)
    return changed if found else f"{recipe.rstrip()}\n\n{line}\n"


@contextlib.contextmanager
def latest_kept() -> Iterator[None]:
    """A benchmark's runs are not the user's newest: runs/latest points where it pointed before."""
    latest = RUNS / "latest"
    before = os.readlink(latest) if latest.is_symlink() else None
    try:
        yield
    finally:
        # Somebody else's run may have finished meanwhile: only a link to one of ours is put back.
        if latest.is_symlink() and os.readlink(latest) in {
            folder(seed).name for seed in SEEDS["whole"]
        }:
            latest.unlink()
            if before is not None:
                latest.symlink_to(before)


def distilled(seed: int, fresh: bool, text: str, runs: Path) -> dict[str, Any]:
    """results.json of the recipe's run with this seed."""
    out = folder(seed, runs)
    print(f"seed {seed}: {out}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary) / "quickstart.yaml"
        recipe.write_text(with_seed(text, seed), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-c", CHILD, str(recipe), str(out), "fresh" if fresh else "reuse"],
            check=True,
            stdout=sys.stderr,
        )
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results


def score(results: dict[str, Any], name: str, model: str, k: str) -> float:
    return float(next(s for s in results["sets"] if s["name"] == name)[model][k])


def toy_runs(seeds: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Return the results of a recipe of seconds in place of the quickstart's."""
    with common.workplace() as folder:
        text = toy.write_recipe(folder, toy.RECIPE).read_text(encoding="utf-8")
        return {seed: distilled(seed, True, text, folder / "runs") for seed in seeds}


def measure(
    runs: dict[int, dict[str, Any]],
    sets: tuple[str, ...],
    here: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    seeds = tuple(runs)
    rows, means = [], {}
    for name in sets:
        for model in ("teacher", "student"):
            scores = {
                k: [score(r, name, model, k) for r in runs.values()] for k in ("top1", "top5")
            }
            means[f"{name}, {model}"] = {k: statistics.mean(v) for k, v in scores.items()}
            rows.append(
                [
                    name,
                    model,
                    *(f"{v:.3f}" for v in scores["top1"]),
                    *(f"{statistics.mean(scores[k]):.3f}" for k in ("top1", "top5")),
                ]
            )
    common.table(
        rows, ["set", "model", *(f"top-1 seed {s}" for s in seeds), "mean top-1", "mean top-5"]
    )
    first = sets[0]
    each = {
        seed: score(r, first, "student", "top1") / score(r, first, "teacher", "top1")
        for seed, r in runs.items()
    }
    ratio = means[f"{first}, student"]["top1"] / means[f"{first}, teacher"]["top1"]
    macs = max(
        r["models"]["student"]["macs"] / r["models"]["teacher"]["macs"] for r in runs.values()
    )
    print(
        f"student / teacher, held-out top-1: {', '.join(f'{v:.3f} (seed {s})' for s, v in each.items())}; ratio of means {ratio:.3f}"
    )
    print(
        "this teacher is not CLIP: an ImageNet classifier and a sentence encoder, joined and adapted\n"
    )
    required = [
        compare.exact(
            "student's held-out top-1 of the teacher's, means over seeds",
            ratio,
            n=len(seeds),
            at_least=0.95,
        )
    ]
    if len(seeds) < len(SEEDS["whole"]):
        required[0]["verdict"] = "not resolved"
    required.append(
        compare.exact("student's MACs of the teacher's", macs, n=len(seeds), at_most=1 / 6)
    )
    seconds = {seed: sum(r["seconds"].values()) for seed, r in runs.items()}
    common.finish(
        {
            "benchmark": "quickstart_seeds",
            "seeds": list(seeds),
            "means": means,
            "ratio_each": each,
            "ratio_of_means": ratio,
            "macs_ratio": macs,
            "seconds": seconds,
            "runs": {seed: {"sets": r["sets"], "models": r["models"]} for seed, r in runs.items()},
        },
        required,
        here,
        options,
    )


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--reuse", action="store_true", help="take or resume the runs that lie there"
    )
    options = parser.parse_args()
    here = common.this_machine()
    seeds = SEEDS[options.form]
    if options.form == common.SMOKE:
        measure(toy_runs(seeds), SHAPES, here, options)
        return
    text = RECIPE.read_text(encoding="utf-8")
    with latest_kept():
        runs = {seed: distilled(seed, not options.reuse, text, RUNS) for seed in seeds}
    measure(runs, SETS, here, options)


if __name__ == "__main__":
    main()

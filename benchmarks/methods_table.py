"""The trial's tables and verdicts from its log: means, standard deviations, and two intervals of a
paired difference.

    t-interval          over the seeds: what another seed would do, on these very photos
    crossed bootstrap   seeds and photos are both drawn again (photos within base and novel apart): what another seed on
                        other photos of the kind would do. Of few seeds a percentile bootstrap takes
                        too little: with five, its seed part covers 83 % in place of 95 %. So a
                        claim stands where both intervals exclude 0.

A line of the log is a run; where a run was repeated with another fingerprint, the newest one
counts, and only runs of the same teacher, data and schedule are paired.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
from scipy import stats
from tabulate import tabulate

REGIMES = {
    "full": "Every weight of the student trained from pixels",
    "small": "Every weight trained, the student at 80 px",
    "vit": "A vision transformer as the student, every weight trained",
    "frozen": "Frozen tower features, projector and EduAttention trained (fast, not the reference)",
}
BOOTSTRAPS = 10_000


def read(log: Path) -> list[dict[str, Any]]:
    """The runs of a log; a line that a killed run left half-written is none."""
    runs = []
    for i, line in enumerate(log.read_text(encoding="utf-8").splitlines() if log.exists() else []):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{log}: line {i + 1} is torn and not counted", file=sys.stderr)
    return runs


def newest(log: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[int, dict[str, Any]]]:
    """(regime, set, method) to seed to the newest run."""
    runs: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for line in log:
        runs.setdefault((line["regime"], line["set"], line["method"]), {})[line["seed"]] = line
    return runs


def figure(run: dict[str, Any], prefix: str = "") -> float:
    """The one figure that a set is judged by."""
    test = run["test"]
    return float(
        test[f"{prefix}harmonic mean"]
        if f"{prefix}harmonic mean" in test
        else test[f"{prefix}held-out concepts"]
    )


def mean(of: dict[int, dict[str, Any]], prefix: str = "") -> float:
    return float(np.mean([figure(run, prefix) for run in of.values()]))


def difference(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """a minus b over the seeds that both have, with the two 95 % intervals; None for fewer than
    two seeds.
    """
    seeds = sorted(
        s
        for s in a.keys() & b.keys()
        if all(a[s].get(f) == b[s].get(f) for f in ("shared", "schedule"))
    )
    if len(seeds) < 2:
        return None
    d = np.array([figure(a[s]) - figure(b[s]) for s in seeds])
    half = float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    low, high = bootstrap([a[s] for s in seeds], [b[s] for s in seeds])
    return {
        "mean": float(d.mean()),
        "t": (float(d.mean()) - half, float(d.mean()) + half),
        "bootstrap": (low, high),
        "n": len(d),
    }


def bootstrap(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[float, float]:
    """95 % percentile interval of mean figure(a) - mean figure(b); both are drawn with the same
    seeds and the same photos.
    """
    seeds, counts = _draws(len(a), tuple(a[0]["images"][name] for name in a[0]["hits"]), BOOTSTRAPS)
    parts = []
    for name, drawn in zip(a[0]["hits"], counts, strict=True):
        rows = np.stack([_hits(run, name) for run in (*a, *b)]).astype(np.float32)
        parts.append(rows @ drawn.astype(np.float32).T / rows.shape[1])
    figures = _combine(parts).T  # [BOOTSTRAPS, runs]
    of_a, of_b = (np.take_along_axis(side, seeds, axis=1) for side in np.split(figures, 2, axis=1))
    low, high = np.percentile((of_a - of_b).mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@functools.cache  # a second for a set's photos, once for all of its rows
def _draws(seeds: int, photos: tuple[int, ...], times: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """[times, seeds]: the seeds drawn again; and of each part, [times, photos]: how often each
    photo was drawn.
    """
    rng = np.random.default_rng(0)
    picked, counts = (
        np.empty((times, seeds), np.int64),
        [np.empty((times, n), np.uint16) for n in photos],
    )
    for i in range(times):
        picked[i] = rng.integers(seeds, size=seeds)
        for drawn, n in zip(counts, photos, strict=True):
            drawn[i] = rng.multinomial(n, np.full(n, 1 / n))
    return picked, counts


def _hits(run: dict[str, Any], name: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(run["hits"][name]), np.uint8))[
        : run["images"][name]
    ]


def _combine(parts: list[np.ndarray]) -> np.ndarray:
    """Harmonic mean of base and novel, or the one part there is."""
    return (
        parts[0]
        if len(parts) == 1
        else 2 * parts[0] * parts[1] / np.maximum(parts[0] + parts[1], 1e-9)
    )


def _spread(runs: dict[int, dict[str, Any]], key: str) -> str:
    x = np.array([r["test"][key] for r in runs.values()])
    return f"{x.mean():.3f}" + (f" ± {x.std(ddof=1):.3f}" if len(x) > 1 else "")


def _interval(d: dict[str, Any] | None) -> list[str]:
    if d is None:
        return ["not measured", "not measured"]
    return [
        f"{100 * d['mean']:+.1f} ({100 * d['t'][0]:+.1f} to {100 * d['t'][1]:+.1f})",
        f"{100 * d['bootstrap'][0]:+.1f} to {100 * d['bootstrap'][1]:+.1f}",
    ]


def tables(log: list[dict[str, Any]]) -> str:
    """Markdown: a table a regime and set, the best method first, each with its difference to
    PromptKD.
    """
    runs = newest(log)
    out = []
    for regime, title in REGIMES.items():
        for name in sorted({s for r, s, _ in runs if r == regime}):
            own = {"teacher, adapted": runs.get(("teacher", name, "teacher"), {})}
            of_regime = {m: runs[regime, s, m] for r, s, m in runs if r == regime and s == name}
            own |= dict(sorted(of_regime.items(), key=lambda x: -mean(x[1])))
            first = next(
                iter(next(r for m, r in own.items() if r and m != "teacher, adapted").values())
            )
            keys = (
                ["base", "novel", "harmonic mean"]
                if "harmonic mean" in first["test"]
                else list(first["images"]) + [f"{k} R@5" for k in first["images"]]
            )
            reference = own.get("PromptKD", {})
            rows = []
            for method, of in own.items():
                if not of:
                    continue
                without = (
                    mean(of, "without_edu_attention_")
                    if next(iter(of.values())).get("alpha") is not None
                    else None
                )
                alpha = [f"{r['alpha']:+.2f}" for r in of.values() if r.get("alpha") is not None]
                paired = (
                    None
                    if method in ("PromptKD", "teacher, adapted")
                    else difference(of, reference)
                )
                rows.append(
                    [
                        method,
                        len(of),
                        *(_spread(of, k) for k in keys),
                        "" if without is None else f"{without:.3f}",
                        ", ".join(alpha),
                    ]
                    + (
                        [""] * 2
                        if method in ("PromptKD", "teacher, adapted")
                        else _interval(paired)
                    )
                )
            images = ", ".join(f"{n} {k}" for k, n in first["images"].items())
            seconds = [
                r["seconds"]
                for m, of in own.items()
                if m != "teacher, adapted"
                for r in of.values()
            ]
            out.append(
                f"### {name}: {title}\n\nTest images: {images}. {len(seconds)} runs, median {np.median(seconds):.0f} s each.\n"
            )
            headers = [
                "method",
                "seeds",
                *keys,
                "without EduAttention",
                "alpha by seed",
                "minus PromptKD, pp (95 % t)",
                "crossed bootstrap 95 %",
            ]
            out.append(tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n")
    return "\n".join(out)


def judged(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trial's goals on the reference rows, as far as the log has them."""
    runs = newest(log)
    required = []
    for name in ("clothing", "grocery", "openmoji"):
        teacher, comkd = (
            runs.get(("teacher", name, "teacher"), {}),
            runs.get(("full", name, "ComKD"), {}),
        )
        if teacher:
            goal = {"clothing": 0.89, "grocery": 0.34, "openmoji": 0.24}[name]
            required.append(
                compare.exact(
                    f"(a) {name}: adapted teacher", mean(teacher), n=len(teacher), at_least=goal
                )
            )
        for regime, at_least in (("full", 1.0), ("small", 0.93)):
            if teacher and (student := runs.get((regime, name, "ComKD"), {})):
                share = mean(student) / mean(teacher)
                required.append(
                    compare.exact(
                        f"(b) {name}, {regime}: ComKD's student over its teacher",
                        share,
                        n=len(student),
                        at_least=at_least,
                    )
                )
        for letter, other, where in (
            ("c", "PromptKD", ("clothing", "grocery")),
            ("e", "student alone", ("clothing", "grocery", "openmoji")),
        ):
            d = difference(comkd, runs.get(("full", name, other), {}))
            if d and name in where:
                required.append(_above(f"({letter}) {name}: ComKD minus {other}", d))
        for regime in REGIMES:
            with_both, without = (
                runs.get((regime, name, m), {}) for m in ("ComKD", "ComKD without EduAttention")
            )
            if d := difference(with_both, without):
                required.append(
                    _above(f"(d) {name}, {regime}: ComKD minus ComKD without EduAttention", d)
                )
    return required


def _above(what: str, d: dict[str, Any]) -> dict[str, Any]:
    """A difference that is to be above 0, judged by its interval over the seeds."""
    verdict = "met" if d["t"][0] > 0 else "missed" if d["t"][1] < 0 else "not resolved"
    return {
        "what": what,
        "found": d["mean"],
        "low": d["t"][0],
        "high": d["t"][1],
        "n": d["n"],
        "at_least": 0.0,
        "at_most": None,
        "verdict": verdict,
    }

"""`edgeclip validate`: is the bundle on this device still the model that was trained?

Same images, same preprocess, two systems: the fp32 torch student, whose features the run kept, and the bundle.
`observe` runs the bundle on the device, which may be a board far away; `judge` compares on the host, in the order in
which things go wrong: names, shapes and dtypes of the graph; the golden images that ship in the bundle
(preprocessing first, then values); then over the run's evaluation images cosine, decisions and accuracy. Every
failed tolerance is listed, not only the first.

How to read it: the raw cosine flatters, since embeddings share a large mean; the centered one does not. Accuracy is
paired, and `upper_pp` is the largest drop (one-sided 95 %) that these images do not exclude: where it exceeds the
margin although the measured drop does not, there are too few images to tell, and that is the verdict.
"""

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.images import index_tar, read, stream
from edgeclip.device.metrics import accuracy_drop, agreement, cosine, hits
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.records import to_json
from edgeclip.device.target import Tolerance
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.progress import track

BATCH = 16
TIE = 1e-5
"""two processors may order scores that are closer than this differently"""
GOLDEN_COSINE = 0.9
"""of the golden images, raw: only a broken bundle or preprocess falls below; the tolerances judge the rest"""


class Evaluation(NamedTuple):
    """What a run keeps for parity: see `distill/evaluate.py`."""

    folder: Path
    reference: np.ndarray
    """[n, D], the fp32 student's features"""
    labels: np.ndarray
    sets: list[dict[str, Any]]
    chosen: list[int]
    """[n], which of the folder's images take part"""
    class_names: list[str] | None = None
    """what labels and classes number; None: a run that is older than this field"""


def load_evaluation(folder: Path, images: int | None = None) -> Evaluation:
    """images: so many of them, always the same ones, for a board that is slow. None: all."""
    disk.verify(folder, disk.read_manifest(folder, "evaluation"))
    description = disk.read_json(folder / "evaluation.json")
    features, labels, sets = (
        np.load(folder / "image_features.npy"),
        np.array(description["labels"]),
        description["sets"],
    )
    chosen = list(range(len(labels)))
    if images is not None and images < len(chosen):
        chosen = sorted(random.Random(0).sample(chosen, images))
        place = {row: i for i, row in enumerate(chosen)}
        sets = [{**s, "rows": [place[r] for r in s["rows"] if r in place]} for s in sets]
    return Evaluation(
        folder, features[chosen], labels[chosen], sets, chosen, description.get("class_names")
    )


def not_compared(bundle: Bundle, evaluation: Evaluation | None) -> str | None:
    """Why the evaluation images cannot be asked of this bundle; None: they can. Their labels are numbers in the run's class list."""
    if evaluation is None:
        return "no run beside this bundle"
    names = evaluation.class_names
    other = (
        "bundle" in bundle.manifest.parents if names is None else names != bundle.labels
    )  # parents: `edgeclip labels` was here
    return "its labels are not the run's classes" if other else None


class Observed(NamedTuple):
    """What a device says of a bundle: all that must come back from a board."""

    facts: dict[str, Any]
    """JSON-able: ran, ports"""
    arrays: dict[str, np.ndarray]
    """golden_features, and where there is something of it: golden_pixels, text_features; of the evaluation images
    features_all, features_basic [n, D] and answers [n], the device's own first answers"""


def validate(
    bundle: Bundle, evaluation: Evaluation | None, machine: dict[str, Any]
) -> dict[str, Any]:
    """The parity report, JSON-able. Without an evaluation folder of the bundle's own labels only the golden images are compared."""
    return judge(bundle, evaluation, observe(bundle, evaluation), machine)


def observe(bundle: Bundle, evaluation: Evaluation | None) -> Observed:
    """Runs the bundle: on the device."""
    encoder = bundle.image_encoder
    arrays = {
        "golden_features": bundle.encode_pixels(np.load(bundle.folder / "golden" / "pixels.npy"))
    }
    facts: dict[str, Any] = {
        "ran": {**encoder.facts, "precision": bundle.precision},
        "ports": [encoder.input, encoder.output],
    }
    if images := bundle.manifest.golden.images:
        arrays["golden_pixels"] = np.stack([bundle.pixels(bundle.folder / p) for p in images])
    if bundle.manifest.text:
        arrays["text_features"] = bundle.encode_text(
            disk.read_json(bundle.folder / "golden" / "texts.json")
        )
    if (
        evaluation is not None
        and not not_compared(bundle, evaluation)
        and not _interface(bundle, facts["ports"])
    ):
        sessions = {"features_all": encoder}
        if bundle.manifest.target.tolerance.optimization_agreement is not None:
            sessions["features_basic"] = bundle.open_image_encoder(optimization="basic")
        arrays |= _features(bundle, evaluation, sessions)
        if np.isfinite(arrays["features_all"]).all():
            arrays["answers"] = np.concatenate(
                [a for a, _, _ in decide(bundle, evaluation, arrays["features_all"])]
            )
    return Observed(facts, arrays)


def judge(
    bundle: Bundle, evaluation: Evaluation | None, observed: Observed, machine: dict[str, Any]
) -> dict[str, Any]:
    """The parity report of what a device observed: on the host. Opens no session."""
    tolerance = bundle.manifest.target.tolerance
    failures = _interface(bundle, observed.facts["ports"])
    runs = not failures
    report: dict[str, Any] = {
        "kind": "parity",
        "target": bundle.manifest.target.name,
        "bundle": disk.sha256(bundle.folder / disk.MANIFEST),
        "machine": machine,
        "ran": observed.facts["ran"],
        "tolerance": to_json(bundle.manifest.target.tolerance),
        "golden": _golden(bundle, observed.arrays, failures),
        "not_compared": not_compared(bundle, evaluation),
        "images": 0,
        "cosine": None,
        "top1_agreement": None,
        "agreement_where_right": None,
        "accuracy": None,
        "sets": [],
        "optimization": None,
    }
    verdict = "golden images only"
    if evaluation is not None and not report["not_compared"] and runs:
        verdict = _compare(bundle, evaluation, observed.arrays, tolerance, report, failures)
    precision, layers = bundle.manifest.target.precision, observed.facts["ran"].get("layers")
    if layers is not None and not layers.get(precision):
        failures.append(
            f"engine: no layer takes {precision} (found {layers}): it is not what it is called"
        )
    report["failures"] = failures
    report["verdict"] = "fail" if failures else verdict
    return report


def _interface(bundle: Bundle, ports: list[Any]) -> list[str]:
    """Names, shapes and dtypes of the image encoder's ports against the manifest."""
    size, width = bundle.preprocess.size, bundle.manifest.embed_dim
    wanted = [
        ("pixels", [None, 3, size, size], "float32"),
        ("image_features", [None, width], "float32"),
    ]
    # A runtime may know the last axis of the output only after a run.
    same = [
        (
            name,
            [w if s is None else s for s, w in zip(found, shape, strict=True)]
            if len(found) == len(shape)
            else found,
            dtype,
        )
        for (name, found, dtype), (_, shape, _) in zip(ports, wanted, strict=True)
    ]
    return [
        f"interface: {got} instead of {want}"
        for got, want in zip(same, wanted, strict=True)
        if list(got) != list(want)
    ]


def _golden(bundle: Bundle, found: dict[str, np.ndarray], failures: list[str]) -> dict[str, Any]:
    folder = bundle.folder / "golden"
    expected_pixels, expected = (
        np.load(folder / "pixels.npy"),
        np.load(folder / "image_features.npy"),
    )
    result: dict[str, Any] = {
        "images": len(expected),
        "largest_pixel_difference": None,
        "text_cosine_min": None,
    }
    if "golden_pixels" in found:
        difference = int(
            np.abs(found["golden_pixels"].astype(int) - expected_pixels.astype(int)).max()
        )
        result["largest_pixel_difference"] = difference
        if difference:
            failures.append(
                f"preprocess: golden images differ by up to {difference} of 255 from the host's"
            )
    if not np.isfinite(found["golden_features"]).all():
        failures.append("values: not finite on the golden images")
    similarity = float((found["golden_features"] * expected).sum(axis=1).min())
    result["cosine_min"] = similarity
    if not similarity >= GOLDEN_COSINE:
        failures.append(f"golden images: cosine {similarity:.3f}, below {GOLDEN_COSINE}")
    if "text_features" in found:
        similarity = float(
            (found["text_features"] * np.load(folder / "text_features.npy")).sum(axis=1).min()
        )
        result["text_cosine_min"] = similarity
        if not similarity >= GOLDEN_COSINE:
            failures.append(f"golden texts: cosine {similarity:.3f}, below {GOLDEN_COSINE}")
    return result


def _features(
    bundle: Bundle, evaluation: Evaluation, sessions: dict[str, Any]
) -> dict[str, np.ndarray]:
    """[n, D] of every evaluation image from each session; every image is decoded once."""
    every = index_tar(evaluation.folder / "images.tar")
    images = [every[i] for i in evaluation.chosen]
    skipped: list[str] = []
    out: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    batches = stream(
        range(len(images)),
        lambda i: bundle.pixels(open_image(read(images[i]), images[i].key)),
        BATCH,
        skipped,
    )
    for _, pixels in track(
        batches, f"validate {bundle.manifest.target.name}", math.ceil(len(images) / BATCH)
    ):
        x = normalize(pixels, bundle.preprocess)
        for name, session in sessions.items():
            out[name].append(session.run(x))
    if skipped:  # the run wrote them: a single one is wrong
        what = f"{len(skipped)} of {len(images)} images are unreadable (first: {skipped[0]})"
        raise EdgeclipError(evaluation.folder, what, "copy the run again, or make it anew")
    return {name: np.concatenate(rows) for name, rows in out.items()}


def _compare(
    bundle: Bundle,
    evaluation: Evaluation,
    found: dict[str, np.ndarray],
    tolerance: Tolerance,
    report: dict[str, Any],
    failures: list[str],
) -> str:
    reference, features = evaluation.reference, found["features_all"]
    if not np.isfinite(features).all():
        failures.append("values: not finite on the evaluation images")
        return "fail"
    every = {
        "reference": reference,
        "all": features,
        **({"basic": found["features_basic"]} if "features_basic" in found else {}),
    }
    decisions = {name: decide(bundle, evaluation, f) for name, f in every.items()}
    answers = {name: np.concatenate([a for a, _, _ in d]) for name, d in decisions.items()}
    right = {name: np.concatenate([h for _, h, _ in d]) for name, d in decisions.items()}
    margin = np.concatenate([m for _, _, m in decisions["all"]])
    if unlike := int(((answers["all"] != found["answers"]) & (margin > TIE)).sum()):
        failures.append(
            f"head: the device's own answers are not those of its features on {unlike} images"
        )

    report["images"] = len(features)
    report["cosine"] = cosine(features, reference)
    report["top1_agreement"] = agreement(answers["all"], answers["reference"])
    report["agreement_where_right"] = agreement(
        answers["all"], answers["reference"], right["reference"]
    )
    report["accuracy"] = {
        "reference_top1": float(right["reference"].mean()),
        "bundle_top1": float(right["all"].mean()),
        **accuracy_drop(right["reference"], right["all"]),
    }
    for s, (_, before, _), (_, after, _) in zip(
        evaluation.sets, decisions["reference"], decisions["all"], strict=True
    ):
        if len(before):
            row = {
                "name": s["name"],
                "note": s["note"],
                "classes": len(s["classes"]),
                "reference_top1": float(before.mean()),
                "bundle_top1": float(after.mean()),
            }
            report["sets"].append(row | accuracy_drop(before, after))
    if "basic" in every:
        same = agreement(answers["all"], answers["basic"])
        report["optimization"] = {"top1_agreement": same, **cosine(features, every["basic"])}
        if same is not None and not same >= (tolerance.optimization_agreement or 0):
            failures.append(
                f"graph optimizations BASIC and ALL agree on {same:.4f} of the answers, below {tolerance.optimization_agreement}"
            )

    p1, accuracy = report["cosine"]["centered_p1"], report["accuracy"]
    if not p1 >= tolerance.centered_cosine_p1:  # not a number is short too
        failures.append(f"centered cosine p1 {p1:.4f}, below {tolerance.centered_cosine_p1}")
    failures += short_of_agreement(
        tolerance, report["top1_agreement"], report["agreement_where_right"]
    )
    if not accuracy["drop_pp"] <= tolerance.accuracy_drop_pp:
        failures.append(
            f"accuracy drop {accuracy['drop_pp']:.2f} pp, above {tolerance.accuracy_drop_pp}"
        )
    return "pass" if accuracy["upper_pp"] <= tolerance.accuracy_drop_pp else "too few images"


def short_of_agreement(
    tolerance: Tolerance, same: float | None, where_right: float | None
) -> list[str]:
    """The agreements below their limits, a line each; None: there is nothing to judge."""
    measured = (
        ("top-1 agreement", same, tolerance.top1_agreement),
        (
            "top-1 agreement where the student is right",
            where_right,
            tolerance.agreement_where_right,
        ),
    )
    return [
        f"{what} {value:.4f}, below {limit}"
        for what, value, limit in measured
        if value is not None and limit is not None and not value >= limit
    ]


def decide(
    bundle: Bundle, evaluation: Evaluation, features: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per evaluation set, each over the set's own class list: answers as class indices [n], right or wrong [n], and by
    how much the best score leads [n]."""
    out = []
    for s in evaluation.sets:
        rows, classes = np.array(s["rows"], int), np.array(s["classes"], int)
        if not len(rows):
            out.append((np.zeros(0, int), np.zeros(0, bool), np.zeros(0)))
            continue
        scores = class_scores(features[rows], bundle.class_features[classes], bundle.head)
        own = np.searchsorted(classes, evaluation.labels[rows])  # class lists are in index order
        best = np.sort(scores, axis=1)[:, -2:]
        out.append((classes[scores.argmax(axis=1)], hits(scores, own), best[:, -1] - best[:, 0]))
    return out

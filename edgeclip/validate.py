"""`edgeclip validate`: is the bundle on this device still the model that was trained?

Same pictures, same preprocess, two systems: the fp32 torch student, whose features the run kept, and the bundle.
Compared in the order in which things go wrong: names, shapes and dtypes of the graph; the golden pictures that ship
in the bundle (preprocessing first, then values); then over the run's evaluation pictures cosine, decisions and
accuracy. Every failed tolerance is listed, not only the first.

How to read it: the raw cosine flatters, since embeddings share a large mean; the centred one does not. Accuracy is
paired, and `upper_pp` is the largest drop (one-sided 95 %) that these pictures do not exclude: where it exceeds the
margin although the measured drop does not, there are too few pictures to tell, and that is the verdict.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.bundle import Bundle
from edgeclip.metrics import accuracy_drop, cosine, hits
from edgeclip.pictures import index_tar, read, refuse_unreadable, stream
from edgeclip.preprocess import open_picture
from edgeclip.progress import track
from edgeclip.target import Tolerance
from edgeclip.zero_shot import class_scores

BATCH = 16
GOLDEN_COSINE = 0.9
"""of the golden pictures, raw: only a broken bundle or preprocess falls below; the tolerances judge the rest"""


class Evaluation(NamedTuple):
    """What a run keeps for parity: see `distill/evaluate.py`."""

    folder: Path
    reference: np.ndarray
    """[n, D], the fp32 student's features"""
    labels: np.ndarray
    sets: list[dict[str, Any]]


def load_evaluation(folder: Path) -> Evaluation:
    disk.verify(folder, disk.read_manifest(folder, "evaluation"))
    description = disk.read_json(folder / "evaluation.json")
    return Evaluation(folder, np.load(folder / "image_features.npy"), np.array(description["labels"]), description["sets"])


def validate(bundle: Bundle, evaluation: Evaluation | None, machine: dict[str, Any]) -> dict[str, Any]:
    """The parity report, JSON-able. Without an evaluation folder only the golden pictures are compared."""
    tolerance = Tolerance(**bundle.manifest["target"]["tolerance"])
    failures = _interface(bundle)
    runs = not failures
    report: dict[str, Any] = {
        "kind": "parity",
        "target": bundle.manifest["target"]["name"],
        "bundle": disk.sha256(bundle.folder / disk.MANIFEST),
        "machine": machine,
        "ran": bundle.image_encoder.facts,
        "tolerance": bundle.manifest["target"]["tolerance"],
        "golden": _golden(bundle, failures),
        "pictures": 0,
        "cosine": None,
        "top1_agreement": None,
        "accuracy": None,
        "sets": [],
        "optimisation": None,
    }
    verdict = "golden pictures only"
    if evaluation is not None and runs:
        verdict = _compare(bundle, evaluation, tolerance, report, failures)
    report["failures"] = failures
    report["verdict"] = "fail" if failures else verdict
    return report


def _interface(bundle: Bundle) -> list[str]:
    """Names, shapes and dtypes of the image encoder against the manifest."""
    i, o = bundle.image_encoder.input, bundle.image_encoder.output
    size, width = bundle.preprocess.size, bundle.manifest["embed_dim"]
    wanted = [("pixels", [None, 3, size, size], "float32"), ("image_features", [None, width], "float32")]
    # A runtime may know the last axis of the output only after a run.
    same = [
        (p.name, [w if s is None else s for s, w in zip(p.shape, shape, strict=True)] if len(p.shape) == len(shape) else p.shape, p.dtype)
        for p, (_, shape, _) in zip((i, o), wanted, strict=True)
    ]
    return [f"interface: {got} instead of {want}" for got, want in zip(same, wanted, strict=True) if list(got) != list(want)]


def _golden(bundle: Bundle, failures: list[str]) -> dict[str, Any]:
    folder = bundle.folder / "golden"
    expected_pixels, expected = np.load(folder / "pixels.npy"), np.load(folder / "image_features.npy")
    result: dict[str, Any] = {"pictures": len(expected), "largest_pixel_difference": None, "text_cosine_min": None}
    if bundle.manifest["golden"]["pictures"]:
        pixels = np.stack([bundle.pixels(bundle.folder / p) for p in bundle.manifest["golden"]["pictures"]])
        difference = int(np.abs(pixels.astype(int) - expected_pixels.astype(int)).max())
        result["largest_pixel_difference"] = difference
        if difference:
            failures.append(f"preprocess: golden pictures differ by up to {difference} of 255 from the host's")
    features = bundle.encode_pixels(expected_pixels)
    if not np.isfinite(features).all():
        failures.append("values: not finite on the golden pictures")
    similarity = float((features * expected).sum(axis=1).min())
    result["cosine_min"] = similarity
    if not similarity >= GOLDEN_COSINE:
        failures.append(f"golden pictures: cosine {similarity:.3f}, below {GOLDEN_COSINE}")
    if bundle.manifest["text"]:
        texts = disk.read_json(folder / "texts.json")
        similarity = float((bundle.encode_text(texts) * np.load(folder / "text_features.npy")).sum(axis=1).min())
        result["text_cosine_min"] = similarity
        if not similarity >= GOLDEN_COSINE:
            failures.append(f"golden texts: cosine {similarity:.3f}, below {GOLDEN_COSINE}")
    return result


def _features(bundle: Bundle, evaluation: Evaluation, sessions: dict[str, Any]) -> dict[str, np.ndarray]:
    """[n, D] of every evaluation picture from each session; every picture is decoded once."""
    pictures = index_tar(evaluation.folder / "pictures.tar")
    skipped: list[str] = []
    out: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    batches = stream(range(len(pictures)), lambda i: bundle.pixels(open_picture(read(pictures[i]), pictures[i].key)), BATCH, skipped)
    from edgeclip.preprocess import normalise

    for _, pixels in track(batches, f"validate {bundle.manifest['target']['name']}", math.ceil(len(pictures) / BATCH)):
        x = normalise(pixels, bundle.preprocess)
        for name, session in sessions.items():
            out[name].append(session.run(x))
    refuse_unreadable(skipped * 100, len(pictures), evaluation.folder)  # the run wrote them: a single one is wrong
    return {name: np.concatenate(rows) for name, rows in out.items()}


def _compare(bundle: Bundle, evaluation: Evaluation, tolerance: Tolerance, report: dict[str, Any], failures: list[str]) -> str:
    sessions = {"all": bundle.image_encoder}
    if tolerance.optimisation_agreement is not None:
        sessions["basic"] = bundle.open_image_encoder(optimisation="basic")
    found = _features(bundle, evaluation, sessions)
    reference, features = evaluation.reference, found["all"]
    if not np.isfinite(features).all():
        failures.append("values: not finite on the evaluation pictures")
        return "fail"
    decisions = {name: _decide(bundle, evaluation, f) for name, f in (("reference", reference), *found.items())}
    answers = {name: np.concatenate([a for a, _ in d]) for name, d in decisions.items()}
    right = {name: np.concatenate([h for _, h in d]) for name, d in decisions.items()}

    report["pictures"] = len(features)
    report["cosine"] = cosine(features, reference)
    report["top1_agreement"] = float((answers["all"] == answers["reference"]).mean())
    report["accuracy"] = {
        "reference_r1": float(right["reference"].mean()),
        "bundle_r1": float(right["all"].mean()),
        **accuracy_drop(right["reference"], right["all"]),
    }
    for s, (_, before), (_, after) in zip(evaluation.sets, decisions["reference"], decisions["all"], strict=True):
        if len(before):
            row = {"name": s["name"], "note": s["note"], "classes": len(s["classes"]), "reference_r1": float(before.mean()), "bundle_r1": float(after.mean())}
            report["sets"].append(row | accuracy_drop(before, after))
    if "basic" in found:
        agreement = float((answers["all"] == answers["basic"]).mean())
        report["optimisation"] = {"top1_agreement": agreement, **cosine(found["all"], found["basic"])}
        if agreement < (tolerance.optimisation_agreement or 0):
            failures.append(f"graph optimisations BASIC and ALL agree on {agreement:.4f} of the answers, below {tolerance.optimisation_agreement}")

    p1, agreement, accuracy = report["cosine"]["centred_p1"], report["top1_agreement"], report["accuracy"]
    if p1 < tolerance.centred_cosine_p1:
        failures.append(f"centred cosine p1 {p1:.4f}, below {tolerance.centred_cosine_p1}")
    if agreement < tolerance.top1_agreement:
        failures.append(f"top-1 agreement {agreement:.4f}, below {tolerance.top1_agreement}")
    if accuracy["drop_pp"] > tolerance.accuracy_drop_pp:
        failures.append(f"accuracy drop {accuracy['drop_pp']:.2f} pp, above {tolerance.accuracy_drop_pp}")
    return "pass" if accuracy["upper_pp"] <= tolerance.accuracy_drop_pp else "too few pictures"


def _decide(bundle: Bundle, evaluation: Evaluation, features: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per evaluation set: (answers as class indices [n], right or wrong [n]), each over the set's own class list."""
    out = []
    for s in evaluation.sets:
        rows, classes = np.array(s["rows"], int), np.array(s["classes"], int)
        if not len(rows):
            out.append((np.zeros(0, int), np.zeros(0, bool)))
            continue
        scores = class_scores(features[rows], bundle.class_features[classes], bundle.head)
        own = np.searchsorted(classes, evaluation.labels[rows])  # class lists are in index order
        out.append((classes[scores.argmax(axis=1)], hits(scores, own)))
    return out

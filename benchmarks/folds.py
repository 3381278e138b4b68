"""Accuracy over all labels, over folds: what the class offset gives, beside none and beside the
best that any could give.

Each fold (`pools.py`) parts the classes anew into those with labels and those without, and the
images into training and test: no fixed test part can be learned by heart. A fold adapts the
teacher, trains each method, and scores:

    none     no class is set back
    shares   as many training images name a labeled class as have a label
    midway   between the mean lead of training images with a label and that of the others
    shipped  the product's rule (`class_offset.fit`): the smaller of the two
    best     the best harmonic mean that any offset has on the test images: a diagnosis by their labels, never shipped

Students learn on the tower's frozen features (--frozen, seconds) or with every weight from pixels
(--full; --small at 80 px, under a fifteenth of the teacher's multiply-accumulates): the same
teacher, views, order, start and steps for every method of a fold.

    results/folds.jsonl  a line a fold and model, appended when it is done; a line that is there is not made again

Required of each set, for the student of its recipe: what the recipe now ships closes at least 80 %
of the way from no offset to the best one of the recipe before (stage 1 by labels alone, where the
log has it), in harmonic mean over all labels, on average over the folds; and with every weight
trained it has .97 of its teacher's, at 80 px .93. An offset moves no answer within a set's own
list.

    python benchmarks/folds.py --frozen --data clothing=DIR --data grocery=DIR --check
    python benchmarks/folds.py --full --sets openmoji --folds 0 1
"""

import argparse
import time
from pathlib import Path
from typing import Any

import common
import compare
import family
import folds_table
import methods
import methods_table
import numpy as np
import pools
import toy
import yaml
from family import Bench
from msgspec import to_builtins
from pools import CPU, FOLDS

from edgeclip import disk
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.zero_shot import EduAttention, class_scores
from edgeclip.host import recipe as R
from edgeclip.host import teachers
from edgeclip.host.adapt.class_offset import Choices, choices, fit, midway, of_share, trade
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.evaluation.scores import image_features

LOG = Path(__file__).parent.parent / "results" / "folds.jsonl"
METHODS = ("PromptKD", "ComKD", "ComKD without EduAttention", "contrastive")
PLAIN = "ComKD without EduAttention"
WITH_CAPTIONS = "ComKD without EduAttention, class captions"
JUDGED = {"clothing": WITH_CAPTIONS, "grocery": WITH_CAPTIONS, "openmoji": PLAIN, "shapes": PLAIN}
"""what the recipes train"""
CLOSED = 0.8
KEPT = {"full": 0.97, "small": 0.93}
"""of the teacher's harmonic mean over all labels, by regime"""
REGIMES = {
    "frozen": "the rows on frozen tower features",
    "full": "the rows with every weight trained",
    "small": "the same with the student at 80 px",
}


def means(labeled: Choices, unlabeled: Choices, offsets: np.ndarray) -> np.ndarray:
    """Harmonic means over all labels at each offset."""
    pairs = zip(labeled.top1(offsets), unlabeled.top1(offsets), strict=True)
    return np.array([harmonic_mean(float(a), float(b)) for a, b in pairs])


def scored(
    bench: Bench, features: dict[str, np.ndarray], head: EduAttention | None
) -> dict[str, Any]:
    """One model's line: top-1 of both halves and their harmonic mean, by rule; the area; within
    own lists.
    """
    dataset, every = bench.dataset, bench.cached.class_features
    classes = dataset.labeled_classes
    (train,), (labeled, unlabeled) = bench.parts["train"], bench.parts["test"]
    on_train = class_scores(features[train.name], every, head)
    has_label = np.isin(train.labels, classes)
    shipped = fit(on_train, dataset, has_label, R.Calibration()).offset
    lead = choices(on_train, classes, train.labels).lead
    shares = of_share(lead, float(has_label.mean()))
    half = midway(lead, has_label)
    halves = [
        choices(class_scores(features[part.name], every, head), classes, part.labels)
        for part in (labeled, unlabeled)
    ]
    leads = np.unique(np.concatenate([half.lead for half in halves]))
    best = float(leads[means(*halves, leads).argmax()])
    rules = {}
    tried = {"none": 0.0, "shares": shares, "midway": half, "shipped": shipped, "best": best}
    for name, offset in tried.items():
        at = np.array([offset])
        top1 = [float(half.top1(at)[0]) for half in halves]
        mean = float(means(*halves, at)[0])
        rules[name] = {"offset": offset, "labeled": top1[0], "unlabeled": top1[1], "mean": mean}
    own = []
    for part in (labeled, unlabeled):
        place = {c: i for i, c in enumerate(part.classes)}
        truth = np.array([place[c] for c in part.labels])
        active = every[part.classes]
        own.append(float(hits(class_scores(features[part.name], active, head), truth).mean()))
    return {
        "rules": rules,
        "area": trade(*halves).area,
        "own_lists": {"labeled": own[0], "unlabeled": own[1], "mean": harmonic_mean(*own)},
        "images": [len(labeled.labels), len(unlabeled.labels)],
    }


DEFAULTS = to_builtins(R.ResidualHead())
BEFORE = 0.3
"""toward_unadapted of the rows of before"""


def answers(
    bench: Bench, losses: dict[str, Any] | None, regime: str, seed: int, teacher: teachers.Teacher
) -> tuple[dict[str, np.ndarray], EduAttention | None]:
    """A student's features of every part, by its name, and the head that it ships with; no losses:
    the teacher's.
    """
    parts = bench.parts["train"] + bench.parts["test"]
    if losses is None:
        return {part.name: family.taught(teacher, part) for part in parts}, None
    learner, _ = family.learn(bench, losses, regime, seed, teacher)
    features = {}
    for part in parts:
        if regime == "frozen":
            features[part.name] = family.projected(learner.student, part)
        else:
            seen = image_features(learner.student, part.images, learner.preprocess, part.name, CPU)
            features[part.name] = seen.features
    return features, family.shipped_head(learner)


def stage_1(spec: R.ResidualHead) -> str:
    """What stage 1 learns from, in words."""
    terms = ["labels"]
    if spec.margin is not None:
        terms.append(f"margin {spec.margin:g}")
    if spec.self_training is not None:
        terms.append("balanced pseudo-labels")
    if spec.toward_unadapted != BEFORE:
        terms.append(f"pull {spec.toward_unadapted:g}")
    return ", ".join(terms)


def key_of(name: str, bench: Bench, regime: str, model: str) -> dict[str, Any]:
    """What a line is of; of the recipe as it is written down, so that a new field with a default
    makes no line a stranger.
    """
    written = yaml.safe_load(bench.path.read_text(encoding="utf-8"))
    written["train"]["epochs"] = bench.recipe.train.epochs  # family.at_size
    parts = ["teacher", "views"]
    losses = None
    if model != "teacher":
        parts += ["student", "train"]
        losses = family.METHODS[model]
    if regime == "frozen" and "train" in parts:  # of the projector's steps alone
        own = written["train"].items()
        written["train"] = {k: v for k, v in own if k.startswith("warmup") or k == "weight_decay"}
    spec = bench.recipe.adapt
    assert isinstance(spec, R.ResidualHead)
    settings = {k: v for k, v in to_builtins(spec).items() if v != DEFAULTS[k]}
    recorded = {part: written[part] for part in parts} | {"losses": losses, "adapt": settings}
    return {
        "set": name,
        "stage_1": stage_1(spec),
        "regime": "teacher" if model == "teacher" else regime,
        "model": model,
        "recipe": disk.fingerprint(recorded)[:16],
    }


def trial(
    name: str,
    bench: Bench,
    regime: str,
    names: list[str],
    folds: list[int],
    folder: Path,
    log: Path,
) -> None:
    """Every line of a set that `log` does not hold yet."""
    spec = bench.recipe.adapt
    assert isinstance(spec, R.ResidualHead)
    for k in folds:
        done = [x for x in methods_table.read(log) if x["fold"] == k]
        keys = [key_of(name, bench, regime, model) for model in ("teacher", *names)]
        missing = [key for key in keys if not any(key.items() <= x.items() for x in done)]
        if not missing:
            continue
        fold = pools.fold_of(bench, k, folder)
        own = pools.bench_of(bench, fold)
        head = folder / "folds-heads" / f"{keys[0]['recipe']}-{k}"
        teacher = adapt(own.teacher, own.cached, fold.dataset, spec, k, head)
        for key in missing:
            losses = family.METHODS.get(key["model"])
            start = time.perf_counter()
            line = scored(own, *answers(own, losses, regime, k, teacher))
            line["seconds"] = round(time.perf_counter() - start, 1)
            methods.append(key | {"fold": k} | line, log)
            print(f"{name} fold {k} {key['model']}: {line['rules']['shipped']}", flush=True)


def judged(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The required figures."""
    required = []
    for name in dict.fromkeys(x["set"] for x in log):
        what = f"{name}, {JUDGED[name]}: of the way from no offset to the best one before, closed"
        closed, folds = folds_table.closed_since(log, name, JUDGED[name])
        if closed is not None:
            required.append(compare.exact(what, closed, n=folds, at_least=CLOSED))
        for regime, least in KEPT.items():
            for model in (PLAIN, WITH_CAPTIONS):
                ratios = folds_table.of_teacher(log, name, model, regime)
                if ratios:
                    what = f"{name}, {model}, {regime}: harmonic mean over the teacher's"
                    ratio = float(np.mean(ratios))
                    required.append(compare.exact(what, ratio, n=len(ratios), at_least=least))
    return required


def smoke(folder: Path) -> list[dict[str, Any]]:
    """Two folds of generated shapes, frozen and with every weight trained; returns the log's
    lines.
    """
    log = folder / "folds.jsonl"
    bench = pools.pool(toy.write_recipe(folder, toy.TRIAL), (), folder / "cache")
    for regime in ("frozen", "full"):
        trial("shapes", bench, regime, [JUDGED["shapes"]], [0, 1], folder / "cache", log)
    return methods_table.read(log)


def main() -> None:
    parser = common.arguments(__doc__)
    for regime, what in REGIMES.items():
        parser.add_argument(f"--{regime}", action="store_true", help=what)
    parser.add_argument("--sets", nargs="+", choices=list(family.SETS), default=list(family.SETS))
    parser.add_argument("--methods", nargs="+", choices=list(family.METHODS), default=METHODS)
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--data", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    options = parser.parse_args()
    here = common.this_machine()
    if options.form == common.SMOKE:
        with common.workplace() as folder:
            log = smoke(folder)
    else:
        for regime in REGIMES:
            if getattr(options, regime):
                measure(regime, options)
        log = methods_table.read(LOG)
    found = folds_table.averages(log)
    common.table(folds_table.rows(log), folds_table.HEADERS)
    common.finish({"benchmark": "folds", "means": found}, judged(log), here, options)


def measure(regime: str, options: argparse.Namespace) -> None:
    """Every line of a regime that was asked for and is not in the log."""
    for name in options.sets:
        roots = tuple(r for r in options.data if r.partition("=")[0] == name)
        bench = pools.pool(family.recipe_of(name, regime), roots, options.cache, regime)
        trial(name, bench, regime, list(options.methods), options.folds, options.cache, LOG)


if __name__ == "__main__":
    main()

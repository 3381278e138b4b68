"""Stage 1 and readings of the losses, chosen inside the folds: by labels that training has, without
a look at a test image.

Each fold of `pools.py` parts its training images once more: some of the classes with labels lose
them (`inner_fold`). A candidate is trained on what is left and scored over all labels of the set,
with the class offset that would ship: top-1 on withheld images of the classes that kept their
labels, on those of the classes that lost them, and their harmonic mean. No label of a class that
has none in the fold takes part. A recipe takes the simplest candidate that lies within one standard
error of the best mean over all inner folds of all folds (Breiman et al. 1984); `folds.py` then
scores the recipe on test images. So an image that one fold is tested on may have had a label in
another fold's choice.

    stage1     settings of `adapt`, scored as a teacher
    readings   losses of ComKD, scored as a student on frozen features, under the recipe's stage 1
    schedules  stage 2 of every weight, scored as a student at 80 px (two fifths of the time of the recipe's size)
    captions   with a contrastive term on class captions or without, as schedules are scored

    results/choices.jsonl  a line a candidate and inner fold, appended when it is done

    python benchmarks/choose.py stage1 --data clothing=DIR --data grocery=DIR
    python benchmarks/choose.py readings --sets openmoji
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import choose_table
import common
import family
import folds
import methods
import methods_table
import numpy as np
import pools
import schedules
import stage1
import torch
import toy
from family import Bench
from readings import DEFAULT, READINGS
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device.zero_shot import EduAttention
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host import teachers
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.distill.optimizer import cosine

LOG = Path(__file__).parent.parent / "results" / "choices.jsonl"
INNER = {"stage1": (2, 2, 5, 5), "readings": (2,), "schedules": (2,), "captions": (2,)}
"""of each inner fold of a fold, into how many parts the labeled classes are parted"""
LAST = "EduAttention last, projector frozen"
MIXES: dict[str, dict[str, Any]] = {
    "lambda 10, without EduAttention": family.METHODS[folds.PLAIN],
    "the same with class captions": family.METHODS[folds.WITH_CAPTIONS],
    "class captions alone": family.METHODS["contrastive"],
}
"""with and without a contrastive term on the balanced captions of classes"""
LOSSES = (
    DEFAULT,
    "lambda 0",
    "lambda 10",
    "KL with the offset",
    "deviations",
    "deviations, own scale",
    "without EduAttention",
    "centered, C .03",
    "FC from identity",
    "centered, FC from identity, C .03",
    LAST,
    *MIXES,
)
KINDS = {
    "stage1": tuple(stage1.STAGE_1),
    "readings": LOSSES,
    "schedules": tuple(s for s in schedules.SCHEDULES if s != schedules.CAPTIONS),
    "captions": ("as the recipe", schedules.CAPTIONS),
}
OF_EVERY_WEIGHT = ("schedules", "captions")


def adapted(bench: Bench, spec: R.ResidualHead, seed: int, folder: Path) -> teachers.Teacher:
    """The teacher after stage 1 on the bench's labels; kept below `folder`."""
    images = [image.key for image in bench.dataset.labeled]
    key = [str(spec), images, len(bench.cached.images), bench.cached.folder.name, seed]
    head = folder / "choose-heads" / disk.fingerprint(key)[:16]
    return adapt(bench.teacher, bench.cached, bench.dataset, spec, seed, head)


def answers(
    bench: Bench, name: str, seed: int, teacher: teachers.Teacher
) -> tuple[dict[str, np.ndarray], EduAttention | None]:
    """A student's features of every part, by its name, and the head that it ships with."""
    without = {k: v for k, v in READINGS[DEFAULT].items() if k != "edu_attention"}
    if name in schedules.SCHEDULES:
        captions = schedules.SCHEDULES[name].captions
        losses = family.METHODS[folds.WITH_CAPTIONS if captions else folds.PLAIN]
        return folds.answers(schedules.scheduled(bench, name), losses, "small", seed, teacher)
    if name in MIXES:
        return folds.answers(bench, MIXES[name], "frozen", seed, teacher)
    if name == "without EduAttention":
        return folds.answers(bench, without, "frozen", seed, teacher)
    if name == LAST:
        learner, _ = family.learn(bench, without, "frozen", seed, teacher)
        parts = bench.parts["train"] + bench.parts["test"]
        features = {part.name: family.projected(learner.student, part) for part in parts}
        return features, attention_alone(bench, learner.student, seed, teacher).numpy()
    return folds.answers(bench, READINGS[name], "frozen", seed, teacher)


def attention_alone(
    bench: Bench, student: students.Student, seed: int, teacher: teachers.Teacher
) -> students.EduAttentionHead:
    """EduAttention trained by the KL on a student whose projector stays as it is, in as many steps
    as the projector had.
    """
    classes = torch.from_numpy(bench.cached.class_features[bench.dataset.train_classes])
    spec, train = R.EduAttention(), bench.recipe.train
    head = students.EduAttentionHead(teacher.embed_dim, spec, torch.Generator().manual_seed(seed))
    rows = torch.from_numpy(bench.cached.rows)
    assert bench.tower_features is not None
    with torch.no_grad():
        u = F.normalize(student.projector(bench.tower_features.flatten(0, 1)), dim=-1)
        t = F.normalize(teacher.features(rows.flatten(0, 1)), dim=-1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=train.warmup_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(train.warmup_steps):
        pick = torch.randint(len(u), (train.warmup_batch_size,), generator=generator)
        answer = teacher.logit_scale * head(u[pick], classes) @ classes.T
        target = (teacher.logit_scale * t[pick] @ classes.T).log_softmax(dim=-1)
        loss = F.kl_div(answer.log_softmax(dim=-1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.warmup_lr * cosine(step, train.warmup_steps)
        optimizer.step()
    return head


def trial(
    kind: str,
    name: str,
    bench: Bench,
    ks: list[int],
    folder: Path,
    log: Path,
    names: Sequence[str],
) -> None:
    """Every line of a set that `log` does not hold yet."""
    own = bench.recipe.adapt
    assert isinstance(own, R.ResidualHead)
    for k in ks:
        fold = pools.fold_of(bench, k, folder)
        for i, parts in enumerate(INNER[kind]):
            key: dict[str, Any] = {"kind": kind, "set": name, "fold": k, "inner": i}
            known = [x["candidate"] for x in methods_table.read(log) if key.items() <= x.items()]
            missing = [c for c in names if c not in known]
            if not missing:
                continue
            inner = pools.bench_of(bench, pools.inner_fold(bench, fold, 10 * k + i % 2, parts))
            for candidate in missing:
                if kind == "stage1":
                    teacher = adapted(inner, stage1.settings(own, candidate), k, folder)
                    found = folds.answers(inner, None, "teacher", k, teacher)
                else:
                    found = answers(inner, candidate, k, adapted(inner, own, k, folder))
                line = folds.scored(inner, *found)
                methods.append(key | {"candidate": candidate} | line, log)
                print(f"{name} {k}.{i} {candidate}: {line['rules']['shipped']}", flush=True)


def smoke(kinds: list[str], folder: Path) -> list[dict[str, Any]]:
    """One fold of generated shapes; returns the log's lines."""
    log = folder / "choices.jsonl"
    bench = pools.pool(toy.write_recipe(folder, toy.TRIAL), (), folder / "cache")
    for kind in kinds:
        names: Sequence[str] = KINDS[kind]
        if kind in OF_EVERY_WEIGHT:
            names = [c for c in names if c in schedules.of_views(bench.recipe.views.count)]
        trial(kind, "shapes", bench, [0], folder / "cache", log, names)
    return methods_table.read(log)


def benches(
    kind: str, name: str, options: argparse.Namespace
) -> Iterator[tuple[Bench, Sequence[str]]]:
    """The pools of a set, and the candidates that are tried on each."""
    roots = tuple(r for r in options.data if r.partition("=")[0] == name)
    asked = options.candidates or KINDS[kind]
    if kind not in OF_EVERY_WEIGHT:
        yield pools.pool(family.recipe_of(name, "frozen"), roots, options.cache), asked
        return
    for count in sorted({schedule.views for schedule in schedules.SCHEDULES.values()}):
        names = [c for c in schedules.of_views(count) if c in asked]
        if names:
            path = family.recipe_of(name, "small")
            yield pools.pool(path, roots, options.cache, "small", count), names


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=" or ".join(KINDS))
    parser.add_argument("--candidates", nargs="+", help="[default: all]")
    parser.add_argument("--sets", nargs="+", choices=list(family.SETS), default=list(family.SETS))
    parser.add_argument("--folds", nargs="+", type=int, choices=pools.FOLDS, default=pools.FOLDS)
    parser.add_argument("--data", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    options = parser.parse_args()
    here = common.this_machine()
    kinds = options.kinds or list(KINDS)
    if options.form == common.SMOKE:
        with common.workplace() as folder:
            log = smoke(kinds, folder)
    else:
        for name in options.sets:
            for kind in kinds:
                for bench, names in benches(kind, name, options):
                    trial(kind, name, bench, list(options.folds), options.cache, LOG, names)
        log = methods_table.read(LOG)
    for kind in kinds:
        common.table(choose_table.rows(log, kind), choose_table.headers(log, kind))
    chosen = {kind: choose_table.chosen(log, kind) for kind in kinds}
    common.finish({"benchmark": "choose", "chosen": chosen}, [], here, options)


if __name__ == "__main__":
    main()

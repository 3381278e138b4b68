"""The trial: every method of the family, same teacher, same student, same data, same budget, paired
seeds.

Measured: zero-shot accuracy on the test parts of clothing and grocery (base, novel, harmonic mean)
and on OpenMoji's held-out concepts (R@1). One teacher cache a set; its head is adapted once a seed,
and every method gets that same head, the same views, order and start of the student. Methods differ
in `losses` alone.

    full     every weight of the student trained from pixels over the cached views: the reference rows
    small    the same at 80 px: under a fifteenth of the teacher's multiply-accumulates
    vit      a ViT as the student, every weight trained (recipes/*-vit.yaml: clothing and grocery): where EduAttention's paper has it,
             as near as it can be had where no ViT's weights come with pip
    frozen   the tower's features stay, projector and EduAttention are trained: minutes, and labeled so

A loss that needs texts takes the prompt of an image's class: its label in the base half, the
adapted teacher's first choice elsewhere (`captions: classes`). Weights within a mix are the papers'
own (CLIP-KD, CLIP-RD, CLIP-Embed-KD); KL is a mean over images at weight 1 and IFAlign's lambda
100, the setting of a first trial. Nothing here was tuned on the test parts; how the teacher is
assembled and adapted was (docs/results.md). A run scores its validation part (OpenMoji: the
unlabeled concepts) and its test part once:

    results/methods.jsonl  a line a run, appended when it is done; a run that is there is not run again
    results/captions.jsonl the same for the rows with class captions since these are balanced (--log)
    docs/results.md        the tables, by benchmarks/figures.py

--smoke trains two methods on generated shapes, for a log of its own.

What bounds it: seeds. One run's harmonic mean on 372 photos has a standard error of about two
points; the rows are paired (same photos, same seed), so their differences are known better than
themselves.

    python benchmarks/methods.py --frozen --data clothing=DIR --data grocery=DIR
    python benchmarks/methods.py --full --sets clothing --methods PromptKD ComKD --data clothing=DIR
    python benchmarks/methods.py --quick --check --data clothing=DIR      # identities and signs
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import compare
import family
import methods_table
import msgspec
import numpy as np
import torch
import toy
import yaml
from msgspec.structs import replace

from edgeclip import disk
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.zero_shot import class_scores
from edgeclip.host import cache, data, recipe, teachers
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.allocator import keep_freed_memory
from edgeclip.host.distill.pixels import frozen_features
from edgeclip.host.evaluation.scores import image_features

LOG = Path(__file__).parent.parent / "results" / "methods.jsonl"
HEADS = Path("runs/methods")
"""where the adapted heads are kept"""
SEEDS = range(5)


def prepare(path: Path, regime: str, roots: tuple[str, ...], folder: Path) -> family.Bench:
    """Builds or opens the teacher cache and the frozen features of the recipe at `path`; `folder`:
    where the cache lies.
    """
    keep_freed_memory()
    asked = family.at_size(recipe.load(path, roots), regime)
    dataset = data.load(asked.data, folder)
    if isinstance(asked.data, R.WebDataset):
        sets = {
            "val": data.load(replace(asked.data, test="val/*.tar"), folder).evaluation,
            "test": dataset.evaluation,
        }
    else:
        of = {s.name: s for s in dataset.evaluation}
        sets = {"val": [of["unlabeled concepts"]], "test": [of["held-out concepts"]]}
    cpu = torch.device("cpu")
    teacher = teachers.load(asked.teacher)
    tower = teachers.folded(teacher)
    ingredients = cache.Ingredients(
        teacher, tower, dataset, asked.views, 0, False, cpu, asked.train.threads
    )
    cached = cache.build(folder, ingredients)
    student, preprocess = students.build(asked.student, teacher.embed_dim)
    student.to(memory_format=torch.channels_last)
    features = (
        frozen_features(student, cached, preprocess, asked, cpu)
        if asked.train.warmup_steps
        else None
    )
    parts: dict[str, list[family.Part]] = {}
    for which, evaluation in sets.items():
        parts[which] = []
        for s in evaluation:
            _, of_teacher, _ = image_features(
                tower, s.images, teacher.preprocess, f"teacher: {which} {s.name}", cpu, 8
            )
            kept, of_student, _ = image_features(
                student.tower, s.images, preprocess, f"student: {which} {s.name}", cpu
            )
            labels = np.array([s.classes.index(s.images[i].label) for i in kept])
            parts[which].append(
                family.Part(
                    s.name, s.classes, labels, [s.images[i] for i in kept], of_teacher, of_student
                )
            )
    return family.Bench(path, asked, dataset, teacher, cached, features, parts)


def fingerprints(bench: family.Bench, method: str, regime: str) -> dict[str, str]:
    """Of what every method of a set shares, of the schedule, and of the run: only runs that share
    the first two are paired.

    Of the recipe as it is written down, so that a new field with a default makes no old run a
    stranger; who changes what the code computes takes the lines out of the log.
    """
    written = yaml.safe_load(bench.path.read_text(encoding="utf-8"))
    images = {
        which: [[p.name, [x.key for x in p.images]] for p in parts]
        for which, parts in bench.parts.items()
    }
    shared = {f: written[f] for f in ("teacher", "adapt", "views")} | {"images": images}
    schedule = {}
    if method in family.METHODS:
        resolved = family.described(bench, family.METHODS[method], regime, 0).train
        schedule = {
            "student": written["student"],
            "train": written["train"],
            "epochs": resolved.epochs,
            "warmup_steps": resolved.warmup_steps,
        }
        schedule |= {"regime": regime} if regime in ("small", "vit") else {}
    whole = {
        "shared": shared,
        "schedule": schedule,
        "fingerprint": shared | schedule | {"losses": family.METHODS.get(method)},
    }
    return {name: disk.fingerprint(what)[:16] for name, what in whole.items()}


def adapted(bench: family.Bench, seed: int, folder: Path = HEADS) -> teachers.Teacher:
    """The bench's teacher with the head of this seed, which is kept below `folder`."""
    assert isinstance(bench.recipe.adapt, R.ResidualHead)
    key = disk.fingerprint(
        {
            "cache": bench.cached.folder.name,
            "adapt": msgspec.to_builtins(bench.recipe.adapt),
            "seed": seed,
        }
    )[:16]
    return adapt(bench.teacher, bench.cached, bench.dataset, bench.recipe.adapt, seed, folder / key)


def run(
    bench: family.Bench, losses: dict[str, Any], regime: str, seed: int, teacher: teachers.Teacher
) -> dict[str, Any]:
    """Trains and scores one student; returns its scores on validation and test parts, hits and
    all.
    """
    start = time.perf_counter()
    learner, loss = family.learn(bench, losses, regime, seed, teacher)
    seconds = time.perf_counter() - start

    def features(part: family.Part) -> np.ndarray:
        if regime == "frozen":
            return family.projected(learner.student, part)
        cpu = torch.device("cpu")
        return image_features(
            learner.student, part.images, learner.preprocess, part.name, cpu
        ).features

    return scored(bench, features, family.shipped_head(learner)) | {
        "alpha": learner.head.alpha.item() if learner.head else None,
        "loss": loss,
        "seconds": round(seconds, 1),
    }


def scored(bench: family.Bench, features: Any, head: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for which, parts in bench.parts.items():
        scores: dict[str, Any] = {}
        for part in parts:
            w = bench.cached.class_features[part.classes]
            u = features(part)
            for name, own in (("", head), *([("without_edu_attention_", None)] if head else [])):
                answers = class_scores(u, w, own)
                top = hits(answers, part.labels, 1)
                scores |= {
                    f"{name}{part.name}": float(top.mean()),
                    f"{name}{part.name} R@5": float(hits(answers, part.labels, 5).mean()),
                }
                if not name and which == "test":
                    out.setdefault("hits", {})[part.name] = (
                        np.packbits(top.astype(bool)).tobytes().hex()
                    )
        for name in ("", "without_edu_attention_"):
            if {f"{name}base", f"{name}novel"} <= scores.keys():
                scores[f"{name}harmonic mean"] = harmonic_mean(
                    scores[f"{name}base"], scores[f"{name}novel"]
                )
        out[which] = {k: round(v, 5) for k, v in scores.items()}
    return out


def append(record: dict[str, Any], log: Path) -> None:
    torn = log.exists() and log.read_bytes()[-1:] not in (
        b"",
        b"\n",
    )  # by a run that was killed while it wrote
    with log.open("a", encoding="utf-8") as f:
        f.write("\n" * torn + json.dumps(record) + "\n")
        f.flush()
        os.fsync(f.fileno())


def trial(
    regime: str,
    names: list[str],
    methods: list[str],
    seeds: list[int],
    roots: tuple[str, ...],
    folder: Path,
    log: Path,
) -> None:
    """Every run that `log` does not hold yet, seed by seed, so that whatever is there is
    paired.
    """
    for name in names:
        if not family.recipe_of(name, regime).exists():
            print(f"{name}: left out, {family.recipe_of(name, regime).name} is not there")
            continue
        given = tuple(r for r in roots if r.partition("=")[0] == name)
        bench = prepare(family.recipe_of(name, regime), regime, given, folder)
        for seed in seeds:
            trial_of_seed(bench, name, regime, methods, seed, adapted(bench, seed), log)


def trial_of_seed(
    bench: family.Bench,
    name: str,
    regime: str,
    methods: list[str],
    seed: int,
    teacher: teachers.Teacher,
    log: Path,
) -> None:
    """The runs of one set and seed that `log` does not hold yet: the teacher's own score, then
    each method's.
    """
    counts = {p.name: len(p.labels) for p in bench.parts["test"]}

    def features(part: family.Part) -> np.ndarray:
        return family.taught(teacher, part)

    for method in ["teacher", *methods]:
        key = {
            "regime": "teacher" if method == "teacher" else regime,
            "set": name,
            "method": method,
            "seed": seed,
        }
        key |= fingerprints(bench, method, regime)
        if any(all(line.get(k) == v for k, v in key.items()) for line in methods_table.read(log)):
            continue
        if method == "teacher":
            result = scored(bench, features, None)
        else:
            result = run(bench, family.METHODS[method], regime, seed, teacher)
        append(key | {"images": counts, "threads": torch.get_num_threads()} | result, log)
        print(
            f"{name} {method} seed {seed}: {result['test']} ({result.get('seconds', 0)} s)",
            flush=True,
        )


def smoke() -> list[dict[str, Any]]:
    """Two methods and two seeds on the toy, frozen and with every weight trained; returns the
    log's lines.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log = folder / "methods.jsonl"
        bench = prepare(toy.write_recipe(folder, toy.TRIAL), "frozen", (), folder / "cache")
        for seed in (0, 1):
            teacher = adapted(bench, seed, folder / "heads")
            for regime in ("frozen", "full"):
                trial_of_seed(bench, "shapes", regime, ["PromptKD", "ComKD"], seed, teacher, log)
        return methods_table.read(log)


def quick(roots: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """Identities and signs on clothing, frozen features, two seeds; nothing goes to the log."""
    bench = prepare(
        family.recipe_of("clothing", "frozen"),
        "frozen",
        tuple(r for r in roots if r.startswith("clothing=")),
        folder,
    )
    required = []
    means: dict[str, list[float]] = {}
    for seed in (0, 1):
        teacher = adapted(bench, seed)
        for method in ("student alone", "PromptKD", "ComKD without both", "ComKD"):
            result = run(bench, family.METHODS[method], "frozen", seed, teacher)
            means.setdefault(method, []).append(result["test"]["harmonic mean"])
            means.setdefault(f"{method}: loss", []).append(result["loss"])
    same = float(
        means["PromptKD: loss"] == means["ComKD without both: loss"]
        and means["PromptKD"] == means["ComKD without both"]
    )
    required.append(
        compare.exact("ComKD without both is PromptKD, loss and answers", same, n=2, at_least=1)
    )
    gain = float(np.mean(means["ComKD"]) - np.mean(means["student alone"]))
    required.append(
        compare.exact("ComKD above the student alone, harmonic mean", gain, n=2, at_least=0)
    )
    required.append(
        compare.exact("ComKD's harmonic mean", float(np.mean(means["ComKD"])), n=2, at_least=0.8)
    )
    return required


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--frozen", action="store_true", help="the rows on frozen tower features")
    parser.add_argument("--full", action="store_true", help="the rows with every weight trained")
    parser.add_argument("--small", action="store_true", help="the same with the student at 80 px")
    parser.add_argument("--vit", action="store_true", help="the same with a ViT as the student")
    parser.add_argument("--sets", nargs="+", choices=list(family.SETS), default=list(family.SETS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(family.METHODS), default=list(family.METHODS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--data", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--log", type=Path, default=LOG, help="of the runs")
    options = parser.parse_args()
    here = common.this_machine()
    roots = tuple(options.data)
    if options.form == common.QUICK:
        common.finish({"benchmark": "methods"}, quick(roots, options.cache), here, options)
        return
    if options.form == common.SMOKE:
        log = smoke()
    else:
        for regime in family.REGIMES:
            if getattr(options, regime):
                given = (options.sets, options.methods, options.seeds, roots, options.cache)
                trial(regime, *given, options.log)
        log = methods_table.read(options.log)
    print(methods_table.tables(log))
    common.finish(
        {"benchmark": "methods", "runs": len(log)}, methods_table.judged(log), here, options
    )


if __name__ == "__main__":
    main()

"""`edgeclip distill`: recipe to run folder, stage by stage; a stage whose folder is finished is not done again.

runs/<name>/recipe.yaml, recipe.json   what was asked, as written and as understood (roots.json: where the data lay)
            teacher/                   stage 1: the adapted teacher's head
            student/                   stage 2: weights, class features, EduAttention
            evaluation/, results.json  what was reached, and what `validate` compares with
            manifest.json              last
"""

import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgeclip import __version__, cache, data, disk, recipe, students, teachers, weights
from edgeclip.allocator import keep_freed_memory
from edgeclip.distill import losses
from edgeclip.distill.adapt import adapt
from edgeclip.distill.evaluate import evaluate
from edgeclip.distill.text import texts
from edgeclip.distill.train import train
from edgeclip.errors import EdgeclipError
from edgeclip.fold import fold
from edgeclip.progress import say
from edgeclip.recipe import Recipe
from edgeclip.zero_shot import prompts

CACHE = Path("cache")


def distill(path: Path, roots: tuple[str, ...] = (), out: Path | None = None, fresh: bool = False) -> dict[str, Any]:
    """Runs the recipe at `path`; returns (and writes) its results. Finished stages of an earlier call are reused.

    Raises `EdgeclipError` for anything the user can put right, among it a run folder that holds another recipe.
    """
    asked = recipe.load(path, roots)
    run = out or Path("runs") / path.stem
    _check_claim(run, asked, fresh)
    if (run / disk.MANIFEST).exists() and not fresh:
        say(f"{run}: finished already (--fresh starts over)")
        _mark_latest(run)
        return load_results(run)
    keep_freed_memory()
    device = _device(asked.train.device)
    clock = _Clock()

    spec = asked.data
    dataset = data.load(spec, CACHE)
    if asked.evaluation_data:
        dataset = _with_evaluation(dataset, data.load(asked.evaluation_data, CACHE))
    captions = asked.student.text is not None or any(name in losses.NEED_CAPTIONS for name in losses.active(asked.losses))
    _check(dataset, asked, captions, path)
    clock.lap("data")

    teacher = teachers.load(asked.teacher)
    if fresh or not (run / "student" / disk.MANIFEST).exists():
        _check_student(dataset, asked, teacher.embed_dim)
    _claim(run, path, asked, fresh)  # only now: a mistake in what was asked leaves no folder behind
    example = torch.randn(2, 3, teacher.preprocess.size, teacher.preprocess.size)
    tower = fold(teacher.tower, example).to(memory_format=torch.channels_last)
    cached = cache.build(CACHE, teacher, tower, dataset, asked.views, asked.seed, captions=captions, device=device, threads=asked.train.threads)
    clock.lap("teacher cache")

    if asked.adapt:
        teacher = adapt(teacher, cached, dataset, asked.adapt, asked.seed, run / "teacher")
    clock.lap("stage 1")

    if not (run / "student" / disk.MANIFEST).exists():
        torch.manual_seed(asked.seed)
        student, preprocess = students.build(asked.student, teacher.embed_dim)
        edu = asked.losses.edu_attention
        head = students.EduAttentionHead(teacher.embed_dim, edu.temperature, torch.Generator().manual_seed(asked.seed)) if edu else None
        text = students.build_text(asked.student.text, teacher.embed_dim) if asked.student.text else None
        learnt = texts(text, teacher, cached, [dataset.classes[i] for i in dataset.train_classes], dataset.templates) if text else None
        log = train(student, head, teacher, cached, preprocess, dataset.train_classes, asked, device, learnt)
        own = text is not None and asked.student.class_features == "student"
        baked = students.class_features(text, dataset.classes, dataset.templates) if text and own else cached.class_features
        description = {
            "architecture": msgspec.to_builtins(asked.student),
            "embed_dim": teacher.embed_dim,
            "edu_attention_temperature": edu.temperature if edu else None,
            "edu_attention_keep": bool(edu and edu.keep),
            "preprocess": msgspec.to_builtins(preprocess),
            "logit_scale": teacher.logit_scale,
            "labels": dataset.classes,
            "templates": list(dataset.templates),
            "licences": {"teacher": teacher.licence, "data": dataset.licence},
            "parents": {"recipe": disk.fingerprint(recipe.description(asked)), "teacher_cache": disk.sha256(cached.folder / disk.MANIFEST)},
            "log": log,
        }
        students.save(run / "student", student, head, description, baked, text)
    student, head, preprocess, description = students.load(run / "student")
    text = students.load_text(run / "student")
    clock.lap("stage 2")

    results = evaluate(
        student,
        head,
        description["edu_attention_keep"],
        preprocess,
        teacher,
        tower,
        dataset,
        cached.class_features,
        asked.parity.max_pictures,
        run / "evaluation",
        device,
        students.class_features(text, dataset.classes, dataset.templates) if text else None,
        asked.student.class_features,
    )
    clock.lap("evaluation")
    results |= {
        "run": str(run),
        "data": dataset.name,
        "data_licence": dataset.licence,
        "models": {
            "teacher": {
                "name": teacher.name,
                "parameters": weights.parameters(tower),
                "macs": weights.macs(tower, teacher.preprocess.size),
                "input": teacher.preprocess.size,
            },
            "student": {
                "name": asked.student.tower.model,
                "parameters": weights.parameters(student),
                "macs": weights.macs(student, preprocess.size),
                "input": preprocess.size,
                "text_parameters": weights.parameters(text.module) if text else None,
            },
        },
        "log": description["log"],
        "edu_attention": None if head is None else {"alpha": head.alpha.item(), "kept": description["edu_attention_keep"]},
        "skipped": cached.manifest["skipped"],
        "device": str(device),
        "seconds": clock.laps,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    disk.write_json(run / "results.json", results)
    disk.write_json(
        run / disk.MANIFEST,
        {"kind": "run", "edgeclip": __version__, "student": disk.sha256(run / "student" / disk.MANIFEST), "recipe": description["parents"]["recipe"]},
    )
    _mark_latest(run)
    return results


def _check_claim(run: Path, asked: Recipe, fresh: bool) -> None:
    """Raises when the run folder holds a run of another recipe, or something that is no run."""
    if (run / "recipe.json").exists():
        different = _differences(disk.read_json(run / "recipe.json"), recipe.description(asked))
        if different and not fresh:
            raise EdgeclipError(run, f"holds a run of another recipe ({'; '.join(different[:5])})", "use --fresh to start over, or another --out")
    elif run.exists() and any(run.iterdir()):
        raise EdgeclipError(run, "is not empty and not a run", "choose another --out")


def _claim(run: Path, path: Path, asked: Recipe, fresh: bool) -> None:
    """Makes the run folder ours."""
    if fresh and run.exists():
        shutil.rmtree(run)
    if (run / "recipe.json").exists():
        say(f"{run}: resuming")
    else:
        disk.write_text(run / "recipe.yaml", path.read_text(encoding="utf-8"))
        disk.write_json(run / "recipe.json", recipe.description(asked))
    disk.write_json(run / "roots.json", recipe.roots(asked))  # data may have moved


def _differences(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a.keys() | b.keys()) for d in _differences(a.get(k), b.get(k), f"{at}.{k}".lstrip("."))]
    return [] if a == b else [f"{at} was {a}, now {b}"]


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise EdgeclipError("train.device: cuda", "this machine has no CUDA device that torch can use", "use device: cpu, or auto")
    device = torch.device(asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    say(f"device: {device}")
    return device


def _with_evaluation(dataset: data.Dataset, other: data.Dataset) -> data.Dataset:
    if dataset.classes and dataset.classes != other.classes:
        raise EdgeclipError("evaluation_data", "has another class list than data", "set data.classes to null, or use one class list")
    everything = list(range(len(other.classes)))
    return dataset._replace(
        classes=other.classes,
        templates=other.templates,
        train_classes=everything,
        evaluation=other.evaluation,
        licence=f"{dataset.licence}; {other.name}: {other.licence}",
    )


def _check(dataset: data.Dataset, asked: Recipe, captions: bool, path: Path) -> None:
    first = asked.train.first
    if first and first.labels == "predictions" and not dataset.classes:
        raise EdgeclipError(f"{path}: train.first.labels", "predictions need a class list, and the data has none", "use labels: features")
    if asked.student.class_features == "student" and not dataset.classes:
        raise EdgeclipError(f"{path}: student.class_features", "needs a class list, and the data has none", "take the teacher's")
    if asked.losses.kl and not dataset.classes:
        raise EdgeclipError(f"{path}: losses.kl", "needs a class list, and the data has none", "give data.classes or evaluation_data")
    if captions and any(not p.caption for p in dataset.train):
        missing = next(p for p in dataset.train if not p.caption)
        raise EdgeclipError(
            f"{path}: losses",
            f"a loss or student.text needs captions, and picture '{missing.key}' of {missing.path} has none",
            "add .txt files, or drop what needs them",
        )
    if not dataset.evaluation or not all(s.pictures for s in dataset.evaluation):
        empty = next((s.name for s in dataset.evaluation if not s.pictures), "")
        raise EdgeclipError(f"{path}: data", f"has no pictures to evaluate on {empty}".rstrip(), "give a test part or evaluation_data")


def _check_student(dataset: data.Dataset, asked: Recipe, embed_dim: int) -> None:
    """Builds the student once for nothing: what cannot be built is refused before the teacher has run."""
    students.build(asked.student, embed_dim)
    if asked.student.text:
        text = students.build_text(asked.student.text, embed_dim)
        classes = [dataset.classes[i] for i in dataset.train_classes]
        students.token_ids(text, [*(p.caption for p in dataset.train), *prompts(classes, dataset.templates)])


def _mark_latest(run: Path) -> None:
    """`runs/latest` (beside the run) points to the newest finished run."""
    latest = run.parent / "latest"
    temporary = run.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.name)
    if latest.is_symlink() or not latest.exists():
        os.replace(temporary, latest)
    else:
        temporary.unlink()


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 1), now


def load_results(run: Path) -> dict[str, Any]:
    disk.read_manifest(run, "run")
    results: dict[str, Any] = disk.read_json(run / "results.json")
    return results

"""`edgeclip distill`: recipe to run folder, stage by stage; a stage whose folder is finished is not done again.

runs/<name>/recipe.yaml, recipe.json   what was asked, as written and as understood (roots.json: where the data lay)
            teacher/                   stage 1: the adapted teacher's head or prompts
            fusion/                    of several teachers, where the recipe fuses them
            student/                   stage 2: weights, class features, EduAttention (student.partial: of the last good epoch)
            checkpoint/                where stage 2 stands, until it is finished; tensorboard/ where the recipe asks
            evaluation/, results.json  what was reached, and what `validate` compares with
            manifest.json              last
"""

import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from edgeclip import __version__, disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, data, distributed, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.allocator import give_back_freed_memory, keep_freed_memory
from edgeclip.host.cache import CACHE
from edgeclip.host.distill import qat as quantized
from edgeclip.host.distill import tensorboard as board
from edgeclip.host.distill.fuse import Fusion, fuse
from edgeclip.host.distill.prepare import check_student, load_data
from edgeclip.host.distill.run_folder import check_claim, claim, mark_latest, move_data, place
from edgeclip.host.distill.targets import TeacherRows, labels
from edgeclip.host.distill.text import texts
from edgeclip.host.distill.train import train
from edgeclip.host.evaluation.scores import evaluate, teacher_features
from edgeclip.host.recipe import Recipe
from edgeclip.host.teachers import Teacher
from edgeclip.host.towers import weights
from edgeclip.progress import Clock, is_rank_zero, say


def distill(
    path: Path, roots: tuple[str, ...] = (), out: Path | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Runs the recipe at `path`; returns (and writes) its results. Finished stages of an earlier call are reused.

    Of several processes (torchrun) all train, the first one does and writes the rest; the others return an empty dict.
    Raises `EdgeclipError` for anything the user can put right, among it a run folder that holds another recipe, and
    `Interrupted` after a signal to stage 2, when it is saved.
    """
    asked = recipe.load(path, roots)
    run = place(out or Path("runs") / path.stem)
    check_claim(run, asked, fresh)
    if (run / disk.MANIFEST).exists() and not fresh:
        say(f"{run}: finished already (--fresh starts over)")
        if roots and is_rank_zero():
            move_data(run, asked)
        mark_latest(run)
        return load_results(run) if is_rank_zero() else {}
    keep_freed_memory()
    device = distributed.start(distributed.pick_device(asked.train.device))
    clock = Clock()
    if asked.train.tensorboard:
        board.check()

    dataset, labeled, captions = load_data(asked, path)
    clock.lap("data")

    teacher = teachers.load(asked.teacher)
    for d in (dataset, *([labeled] if labeled else [])):
        teachers.check_class_names(teacher, d.classes, d.templates)
    stage_1 = labeled or dataset
    prompted = (
        promptsrc.with_prompts(teacher, stage_1, dataset.classes, asked.adapt, asked.seed)
        if isinstance(asked.adapt, recipe.Prompts)
        else None
    )
    if fresh or not (run / "student" / disk.MANIFEST).exists():
        check_student(dataset, asked, teacher.embed_dim)
    distributed.barrier()
    with distributed.rank_zero_first():
        if not distributed.rank():
            claim(
                run, path, asked, fresh
            )  # only now: a mistake in what was asked leaves no folder behind
    unprompted = dataset
    if prompted:  # prompts change the tower whose rows the cache keeps, so they come first
        with distributed.rank_zero_first():
            teacher = promptsrc.adapt(teacher, prompted, stage_1, asked, run / "teacher", device)
        dataset = dataset._replace(templates=promptsrc.TEMPLATES)  # of the prompted teacher alone
        clock.lap("stage 1")
    tower = teachers.folded(teacher)
    with distributed.rank_zero_first():
        cached = cache.build(
            CACHE,
            teacher,
            tower,
            dataset,
            asked.views,
            asked.seed,
            captions=captions,
            device=device,
            threads=asked.train.threads,
        )
    clock.lap("teacher cache")

    def stage_1_head(
        teacher: Teacher, tower: nn.Module | None, cached: cache.TeacherCache, folder: Path
    ) -> Teacher:
        if not isinstance(asked.adapt, recipe.ResidualHead):
            return teacher
        if labeled is None:
            return adapt(teacher, cached, dataset, asked.adapt, asked.seed, folder)
        only = labeled._replace(
            train=labeled.labeled
        )  # cross-dataset: stage 1 has images and classes of its own
        rows = cache.build(
            CACHE,
            teacher,
            tower,
            only,
            asked.views,
            asked.seed,
            captions=False,
            device=device,
            threads=asked.train.threads,
        )
        return adapt(teacher, rows, only, asked.adapt, asked.seed, folder)

    if isinstance(asked.adapt, recipe.ResidualHead):
        with distributed.rank_zero_first():
            teacher = stage_1_head(teacher, tower, cached, run / "teacher")
        clock.lap("stage 1")

    def another(spec: recipe.Teacher, folder: Path) -> tuple[Teacher, cache.TeacherCache]:
        other = teachers.load(spec)
        other_tower = teachers.folded(other)
        with distributed.rank_zero_first():
            rows = cache.build(
                CACHE,
                other,
                other_tower,
                unprompted,
                asked.views,
                asked.seed,
                captions=captions,
                device=device,
                threads=asked.train.threads,
            )
            if isinstance(spec, recipe.Conse):
                other = stage_1_head(other, other_tower, rows, folder)
        cache.refuse_other_views(cached, rows)
        return teachers.without_towers(other), rows

    others = [
        another(spec, run / f"teacher-{i}") for i, spec in enumerate(asked.other_teachers, start=2)
    ]
    if differ := next(
        (
            str(c.folder)
            for _, c in others
            if asked.student.text and c.manifest["captions"] != cached.manifest["captions"]
        ),
        None,
    ):
        where = f"{path}: student.text"
        raise EdgeclipError(
            where,
            f"reads the first teacher's captions, and {differ} has another number of them an image",
            "leave that teacher out",
        )
    fusion: Fusion | None = None
    if asked.fuse:
        with distributed.rank_zero_first():
            side_by_side = [
                TeacherRows(t, c, dataset.train_classes, device)
                for t, c in [(teacher, cached), *others]
            ]
            fusion = fuse(
                side_by_side, labels(cached, dataset), asked.fuse, asked.seed, run / "fusion"
            )
    if others:
        clock.lap("other teachers")

    if not (run / "student" / disk.MANIFEST).exists():
        torch.manual_seed(asked.seed)
        student, preprocess = students.build(asked.student, teacher.embed_dim)
        edu = asked.losses.edu_attention
        head = (
            students.EduAttentionHead(
                teacher.embed_dim, edu, torch.Generator().manual_seed(asked.seed)
            )
            if edu
            else None
        )
        text = (
            students.build_text(asked.student.text, teacher.embed_dim)
            if asked.student.text
            else None
        )
        learned = (
            texts(
                text,
                teacher,
                cached,
                [dataset.classes[i] for i in dataset.train_classes],
                dataset.templates,
            )
            if text
            else None
        )
        description = {
            "architecture": msgspec.to_builtins(asked.student),
            "embed_dim": teacher.embed_dim,
            "edu_attention": msgspec.to_builtins(edu),
            "preprocess": msgspec.to_builtins(preprocess),
            "logit_scale": teacher.logit_scale,
            "labels": dataset.classes,
            "templates": list(dataset.templates),
            "licenses": _licenses(asked, dataset, [teacher, *(t for t, _ in others)]),
            "parents": {
                "recipe": disk.fingerprint(recipe.description(asked)),
                "teacher_cache": disk.sha256(cached.folder / disk.MANIFEST),
            },
        }

        def save(folder: Path, log: list[dict[str, Any]]) -> None:
            own = text is not None and asked.student.class_features == "student"
            baked = (
                students.class_features(text, dataset.classes, dataset.templates)
                if text and own
                else cached.class_features
            )
            students.save(folder, student, head, description | {"log": log}, baked, text)

        teacher, tower, prompted = (
            teachers.without_towers(teacher),
            None,
            None,
        )  # from here on the memory is the student's
        give_back_freed_memory()
        log = train(
            student,
            head,
            teacher,
            cached,
            preprocess,
            dataset,
            asked,
            device,
            others=others,
            fusion=fusion,
            texts=learned,
            keep=partial(save, run / "student.partial"),
            checkpoints=run / "checkpoint",
            board=run / "tensorboard" if asked.train.tensorboard else None,
            clock=clock,
        )
        if asked.qat:

            def again(
                copy: nn.Module, own_head: nn.Module | None, recipe: Recipe
            ) -> list[dict[str, Any]]:
                return train(
                    copy,
                    own_head,
                    teacher,
                    cached,
                    preprocess,
                    dataset,
                    recipe,
                    device,
                    others=others,
                    fusion=fusion,
                    clock=clock,
                )

            quantized.after_stage_2(
                asked,
                cached,
                student,
                head,
                preprocess,
                run / "quantized",
                description["parents"],
                again,
            )
        if not distributed.rank():
            save(run / "student", log)
            for temporary in ("student.partial", "checkpoint"):
                shutil.rmtree(run / temporary, ignore_errors=True)
    processes = distributed.world_size()
    distributed.barrier()
    distributed.stop()
    if not is_rank_zero():
        return {}
    student, head, preprocess, description = students.load(run / "student")
    text = students.load_text(run / "student")
    clock.lap("rest of stage 2")

    tower = tower or _tower(asked, run)
    scored = [(teacher, tower)]
    if fusion:
        scored += [
            (t, teachers.folded(teachers.load(spec)))
            for (t, _), spec in zip(others, asked.other_teachers, strict=True)
        ]
    towers = [
        (t, own) for t, own in scored if own is not None
    ]  # a teacher of ready embeddings has none to be scored with
    results = evaluate(
        student,
        head,
        preprocess,
        partial(teacher_features, towers, fusion, device=device)
        if len(towers) == len(scored)
        else None,
        dataset,
        cached.class_features,
        asked.parity.max_images,
        run / "evaluation",
        device,
        students.class_features(text, dataset.classes, dataset.templates) if text else None,
        asked.student.class_features,
    )
    clock.lap("evaluation")
    results |= {
        "run": str(run),
        "data": dataset.name,
        "data_license": dataset.license,
        "models": {
            "teacher": {
                "name": teacher.name,
                "parameters": weights.parameters(tower) if tower else None,
                "macs": weights.macs(tower, teacher.preprocess.size) if tower else None,
                "input": teacher.preprocess.size,
            },
            "student": {
                "name": asked.student.tower.model
                + (f" behind {asked.student.stem.model}" if asked.student.stem else ""),
                "parameters": weights.parameters(student),
                "macs": weights.macs(student, preprocess.size),
                "input": preprocess.size,
                "text_parameters": weights.parameters(text.module) if text else None,
            },
        },
        "log": description["log"],
        "edu_attention": None
        if head is None
        else {"alpha": head.alpha.item(), "kept": head.spec.keep},
        "skipped": cached.manifest["skipped"],
        "device": str(device),
        "processes": processes,
        "seconds": {name: round(seconds, 1) for name, seconds in clock.laps.items()},
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    disk.write_json(run / "results.json", results)
    disk.write_json(
        run / disk.MANIFEST,
        {
            "kind": "run",
            "edgeclip": __version__,
            "student": disk.sha256(run / "student" / disk.MANIFEST),
            "recipe": description["parents"]["recipe"],
        },
    )
    mark_latest(run)
    return results


def _tower(asked: Recipe, run: Path) -> nn.Module | None:
    """The teacher's tower once more: training did without it."""
    teacher = teachers.load(asked.teacher)
    if isinstance(asked.adapt, recipe.Prompts):
        teacher = promptsrc.adapted(teacher, asked.adapt, run / "teacher")
    return teachers.folded(teacher)


def _licenses(asked: Recipe, dataset: data.Dataset, of: list[Teacher]) -> dict[str, str]:
    """Of everything that went into the student and its evaluation."""
    towers = [
        t
        for t in (asked.student.tower, asked.student.inherit, asked.student.text)
        if isinstance(t, recipe.OpenClip)
    ]
    sets = [
        d.license
        for d in (asked.adapt_data, *asked.shifts)
        if d and not isinstance(d, recipe.OpenMoji)
    ]
    found = {
        "teacher": [t.license for t in of],
        "data": [dataset.license, *sets],
        "student": [f"{t.model}: {t.license}" for t in towers],
    }
    return {
        what: "; ".join(dict.fromkeys(licenses)) for what, licenses in found.items() if licenses
    }


def load_results(run: Path) -> dict[str, Any]:
    disk.read_manifest(run, "run")
    results: dict[str, Any] = disk.read_json(run / "results.json")
    return results

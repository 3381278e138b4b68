"""`edgeclip distill`: from a recipe to a run folder, stage by stage.

A stage whose folder is finished is not done again.

    runs/<name>/recipe.yaml, recipe.json  the recipe, as written and as understood
                roots.json                where the data lie
                training_images/          hashes of the training images
                teacher/                  stage 1: the adapted teacher's head or prompts
                fusion/                   of several teachers, where the recipe fuses them
                student/                  stage 2: weights, class features, EduAttention
                student.partial/          the same of the last good epoch, until stage 2 is finished
                checkpoint/               where stage 2 stands, until it is finished
                checkpoint_quantized/     and where the copy stands that learns an int8 target
                tensorboard/              where the recipe asks for it
                quantized/                the copy that learned an int8 target's rounding
                evaluation/               what `validate` compares with
                results.json              what was reached
                manifest.json             last
"""

import contextlib
from pathlib import Path

from edgeclip import disk
from edgeclip.host import distributed
from edgeclip.host import recipe as recipes
from edgeclip.host.allocator import give_back_freed_memory, keep_freed_memory
from edgeclip.host.cache import CACHE
from edgeclip.host.distill import tensorboard
from edgeclip.host.distill.prepare import compare_images, first_teacher, load_inputs
from edgeclip.host.distill.results import score
from edgeclip.host.distill.run_folder import check_claim, mark_latest, move_data, place
from edgeclip.host.distill.stage1 import stage1
from edgeclip.host.distill.stage2 import new_student, remove_interim, stage2
from edgeclip.host.recipe import Recipe
from edgeclip.progress import Clock, is_rank_zero, say
from edgeclip.reports.results import EvaluationResults, read_results


def distill(
    path: Path, roots: tuple[str, ...] = (), out: Path | None = None, fresh: bool = False
) -> EvaluationResults | None:
    """Run the recipe at `path`, and return and write its results.

    Finished stages of an earlier call are reused. Of several processes (torchrun) all train, rank 0
    does and writes the rest; the others return None. Raises `EdgeclipError` for anything that the
    user can put right, among it a run folder that holds another recipe, and `Interrupted` after a
    signal to stage 2, when it is saved.
    """
    recipe = recipes.load(path, roots)
    run = place(out or Path("runs") / path.stem)
    for folder in (run, CACHE):
        disk.refuse_unwritable(folder)
    if (run / disk.MANIFEST).exists() and not fresh:
        with disk.shared(run):
            check_claim(run, recipe, fresh)
            return _finished(run, recipe, moved=bool(roots))
    lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_rank_zero():
        lock = disk.locked(run)
    with lock:
        check_claim(run, recipe, fresh)
        return _train(path, recipe, run, fresh)


def _train(path: Path, recipe: Recipe, run: Path, fresh: bool) -> EvaluationResults | None:
    """Do every stage that is not finished; at rank 0 return the results."""
    keep_freed_memory()
    device = distributed.start(distributed.pick_device(recipe.train.device))
    clock = Clock()
    if recipe.train.tensorboard:
        tensorboard.check()

    inputs = load_inputs(path, recipe, device)
    clock.lap("data")
    first = first_teacher(inputs, run, fresh)
    inputs = compare_images(inputs, run)
    clock.lap("hashes of images")
    lesson = stage1(inputs, first, run, clock)
    del first  # so that its towers go when the lesson lets go of them
    if not (run / "student" / disk.MANIFEST).exists():
        new = new_student(inputs, lesson)
        lesson = lesson.without_towers()  # from here on the memory is the student's
        give_back_freed_memory()
        stage2(inputs, lesson, new, run, clock)
    if is_rank_zero():  # also where a kill came between the student and this
        remove_interim(run)

    processes = distributed.world_size()
    distributed.barrier()
    distributed.stop()
    if not is_rank_zero():
        return None
    results = score(inputs, lesson, run, clock, processes)
    mark_latest(run)
    return results


def _finished(run: Path, recipe: Recipe, moved: bool) -> EvaluationResults | None:
    """Return the results of a run that was finished before.

    moved: the recipe says where the data lie now.
    """
    say(f"{run}: finished already (--fresh starts over)")
    if moved and is_rank_zero():
        move_data(run, recipe)
    mark_latest(run)
    if not is_rank_zero():
        return None
    return read_results(run)

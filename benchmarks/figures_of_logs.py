"""The pages' tables of logs (JSON lines): trials, folds, choices, families."""

from collections.abc import Callable
from typing import Any

import choose_table
import folds_compare
import folds_table
import methods_table
import readings_table
from figure_cells import markdown, short


def methods(runs: list[dict[str, Any]]) -> str:
    """Render every table of the trial, a regime and set each."""
    return "\n" + methods_table.tables(runs) + "\n"


def methods_summary(runs: list[dict[str, Any]]) -> str:
    """Render the trial's reference rows: a method's figure on each set, and its difference to
    PromptKD.
    """
    newest = methods_table.newest(runs)
    sets = ("clothing", "grocery", "openmoji")
    names = {method for regime, _, method in newest if regime == "full"} - {"PromptKD"}
    ordered = sorted(names, key=lambda m: -methods_table.mean(newest["full", "clothing", m]))
    rows = []
    teacher = [short(methods_table.mean(newest["teacher", name, "teacher"])) for name in sets]
    rows.append(["teacher, adapted", *teacher])
    for method in ["PromptKD", *ordered]:
        cells = [_beside_promptkd(newest, name, method) for name in sets]
        rows.append([SHOWN_AS.get(method, method), *cells])
    return markdown(["", "clothing", "grocery", "OpenMoji"], rows)


SHOWN_AS = {"student alone": "hard labels, no teacher"}


def _beside_promptkd(newest: dict[tuple[str, str, str], Any], name: str, method: str) -> str:
    own = newest["full", name, method]
    figure = short(methods_table.mean(own))
    if method == "PromptKD":
        return figure
    difference = methods_table.difference(own, newest["full", name, "PromptKD"])
    if difference is None:
        return figure
    low, high = difference["t"]
    cell = f"{figure} ({100 * difference['mean']:+.1f}: {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0 or high < 0:
        return f"**{cell}**"
    return cell


def folds_kept(log: list[dict[str, Any]]) -> str:
    """Render results/folds.jsonl: what students keep of their teachers."""
    return markdown(folds_table.KEPT_HEADERS, folds_table.kept_rows(log))


def choices_stage_1(log: list[dict[str, Any]]) -> str:
    """Render results/choices.jsonl: stage 1 by inner folds."""
    return markdown(choose_table.headers(log, "stage1"), choose_table.rows(log, "stage1"))


def choices_readings(log: list[dict[str, Any]]) -> str:
    """Render results/choices.jsonl: readings of ComKD by inner folds."""
    return markdown(choose_table.headers(log, "readings"), choose_table.rows(log, "readings"))


def choices_schedules(log: list[dict[str, Any]]) -> str:
    """Render results/choices.jsonl: schedules of stage 2 by inner folds."""
    return markdown(choose_table.headers(log, "schedules"), choose_table.rows(log, "schedules"))


def choices_captions(log: list[dict[str, Any]]) -> str:
    """Render results/choices.jsonl: class captions with every weight trained, by inner folds."""
    return markdown(choose_table.headers(log, "captions"), choose_table.rows(log, "captions"))


def choices_offsets(log: list[dict[str, Any]]) -> str:
    """Render results/choices.jsonl: rules of the class offset by inner folds."""
    return markdown(choose_table.OFFSET_HEADERS, choose_table.offset_rows(log))


def folds_differences(log: list[dict[str, Any]]) -> str:
    """Render results/folds.jsonl: each method less PromptKD, paired by fold, and what it allows to
    say.
    """
    return markdown(folds_compare.HEADERS, folds_compare.rows(log))


def folds(log: list[dict[str, Any]]) -> str:
    """Render results/folds.jsonl: the harmonic mean over all labels by offset, means over folds."""
    return markdown(folds_table.HEADERS, folds_table.rows(log))


def readings(runs: list[dict[str, Any]]) -> str:
    """Render each reading's gain over the default, the best one on average first."""
    rows = []
    for reading in readings_table.sorted_readings(runs):
        if reading == readings_table.DEFAULT:
            continue
        if reading == readings_table.DEFAULT:
            continue
        cells = [readings_table.cell(runs, name, reading) for name in readings_table.CHOOSE]
        rows.append([reading, *cells])
    return markdown(["reading", *readings_table.CHOOSE], rows)


def families(rows: list[dict[str, Any]]) -> str:
    """Render a line a family: does it export, does it build, how large and how fast are float32
    and int8.
    """
    built = {True: "yes", False: "**no**", None: "not checked"}
    cells = []
    for r in rows:
        text = built[r["text_tensorrt_builds"]] if "text_tensorrt_builds" in r else "no text"
        cells.append(
            [
                r["family"],
                r["image_size"],
                f"{r['float_error']:.0e}",
                r["int8_layers"],
                f"{r['float_ms']} / {r['float_mib']}",
                f"{r['onnx-int8_ms']} / {r['onnx-int8_mib']}",
                f"{r['float_ms'] / r['onnx-int8_ms']:.2f}",
                f"{r['tensorrt_mib']}, {built[r['tensorrt_builds']]} / {text} ({r['tensorrt_s']})",
                r.get("text_mib", ""),
            ]
        )
    headers = [
        "family",
        "input",
        "float error",
        "int8 layers",
        "onnx-fp32 ms / MiB",
        "onnx-int8 ms / MiB",
        "times as fast",
        "tensorrt-int8 MiB, image / text build (s)",
        "text int8 MiB",
    ]
    return markdown(headers, cells)


def power(figures: dict[str, Any]) -> str:
    """Render results/verdict_power.json: the gate's errors and the named numbers."""
    headers = [
        "images, answers that change",
        "fails though nothing is lost",
        "holds though twice the margin is lost",
        "images that are named",
        "holds with so many",
        "named over needed",
    ]
    return markdown(headers, figures["rows"])


def power_misses(figures: dict[str, Any]) -> str:
    """Render results/verdict_power.json: how often limits miss."""
    cells = [[name, f"{share:.1%}"] for name, share in figures["misses"].items()]
    return markdown(["limits of", "misses"], cells)


def waterfall_steps(figures: dict[str, Any]) -> str:
    """Render results/waterfall.json: what each step of the bundles as they are lost."""
    names = ("student", "export", "preprocess", "int8", "typed words")
    rows = []
    for r in figures["rows"]:
        if r["at"] is not None:
            continue
        cells = []
        for name in names:
            step = r["steps"].get(name)
            cells.append(
                f"{step['drop_pp']:.2f} ({step['low']:.2f} to {step['high']:.2f})" if step else ""
            )
        apart = f"{r['apart']:d}"
        rows.append(
            [f"{r['run']}, {r['fault']}", r["images"], f"{r['start_top1']:.4f}", *cells, apart]
        )
    headers = ["run, bundle", "images", "teacher's top-1", *(f"{n}: pp lost" for n in names)]
    return markdown([*headers, "images that steps and whole way differ by"], rows)


def waterfall_faults(figures: dict[str, Any]) -> str:
    """Render results/waterfall.json: what each planted fault did, and what the sentence named."""
    rows = []
    for r in figures["rows"]:
        if r["at"] is None:
            continue
        step = r["steps"][r["at"]]
        lost = f"{step['drop_pp']:.2f} ({step['low']:.2f} to {step['high']:.2f})"
        cosine = "" if step["cosine"] is None else f"{step['cosine']:.3f}"
        _, named, rest = r["most"].partition("most was lost by ")
        says = rest.partition(":")[0]
        if not named:
            moved = r["most"].rpartition("; ")[2].partition(" moved the features")[0]
            says = f"{moved}, by its cosine"
        rows.append([r["run"], r["fault"], r["at"], lost, cosine, says])
    headers = [
        "run",
        "fault",
        "planted in",
        "pp lost there",
        "cosine p1 there",
        "step that is named",
    ]
    return markdown(headers, rows)


OF_LOGS: dict[str, Callable[[Any], str]] = {
    "families": families,
    "choices_stage_1": choices_stage_1,
    "choices_readings": choices_readings,
    "choices_captions": choices_captions,
    "choices_schedules": choices_schedules,
    "power": power,
    "power_misses": power_misses,
    "choices_offsets": choices_offsets,
    "folds": folds,
    "folds_differences": folds_differences,
    "folds_kept": folds_kept,
    "methods": methods,
    "methods_summary": methods_summary,
    "readings": readings,
    "waterfall_faults": waterfall_faults,
    "waterfall_steps": waterfall_steps,
}

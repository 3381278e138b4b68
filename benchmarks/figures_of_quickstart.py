"""The pages' tables of the quickstart: benchmarks/quickstart.py and quickstart_seeds.py."""

from typing import Any

from figure_cells import markdown, short


def quickstart_seeds(found: dict[str, Any]) -> str:
    """Render benchmarks/quickstart_seeds.py: top-1 accuracy of teacher and student, a column a
    seed.
    """
    runs = list(found["runs"].values())
    rows = []
    for label, means in found["means"].items():
        name, model = label.rsplit(", ", 1)
        sets = [next(s for s in run["sets"] if s["name"] == name) for run in runs]
        each = [short(s[model]["top1"]) for s in sets]
        first = sets[0]
        rows.append(
            [
                name,
                model,
                *each,
                short(means["top1"]),
                short(means["top5"]),
                short(first["chance_top1"], 4),
                first["images"],
            ]
        )
    seeds = [f"seed {s}" for s in found["seeds"]]
    return markdown(["set", "model", *seeds, "mean top-1", "mean top-5", "chance", "images"], rows)


def quickstart(found: dict[str, Any]) -> str:
    """Render benchmarks/quickstart.py: time and memory, a column a command."""
    commands = found["commands"]
    seconds = [f"{of['seconds']:.0f}" for of in commands.values()]
    memory = [f"{of['peak_memory_mib']:,.0f}" for of in commands.values()]
    here = found["machine"]
    machine = f"{here['cpu']}, {here['cores']} cores, {', '.join(here['isa'] or ['no SIMD known'])}"
    return markdown([machine, *commands], [["s", *seconds], ["peak MiB", *memory]])


def quickstart_scores(found: dict[str, Any]) -> str:
    """Render benchmarks/quickstart.py: accuracy over all labels and within each set's own list."""
    rows = []
    for one in found["sets"]:
        of = [one["teacher"], one["student"], one["student_without_offset"] or one["student"]]
        every = [model and _top_1_and_5(model) for model in of]
        own = [model and _top_1_and_5(model, "own_list_") for model in of[:2]]
        rows.append([one["name"], one["images"], *every, short(one["chance_top1"], 4), *own])
    headers = ["top-1 / top-5", "images", "teacher", "student", "no offset", "chance"]
    headers += ["own list: teacher", "student"]
    return markdown(headers, rows)


def _top_1_and_5(accuracy: dict[str, float], prefix: str = "") -> str:
    return f"{short(accuracy[f'{prefix}top1'])}/{short(accuracy[f'{prefix}top5'])}"


def quickstart_targets(found: dict[str, Any]) -> str:
    """Render benchmarks/quickstart.py: size, accuracy lost, latency and verdict of each target."""
    rows = []
    for of in found["targets"]:
        lost = None
        if of["parity"] and of["parity"]["accuracy"]:
            drop = of["parity"]["accuracy"]
            lost = f"{drop['drop_pp']:.2f} ({drop['upper_pp']:.2f})"
        bench = of["bench"] or {}
        size = f"{of['image_encoder_mib']:.1f}"
        if bench.get("bundle_bytes"):
            size += f" of {bench['bundle_bytes'] / 2**20:.1f}"
        whole, model = bench.get("whole_image"), bench.get("single_stream")
        p90 = None
        if model:
            whole_ms = _p90(whole["from_file"]) if whole else "?"
            p90 = f"{whole_ms} ({_p90(model)})"
        rows.append([of["target"], size, lost, p90, _verdict(of["verdict"])])
    headers = [
        "target",
        "encoder, MiB",
        "top-1 lost, pp (limit)",
        "p90 ms (model alone)",
        "verdict",
    ]
    return markdown(headers, rows)


def _p90(latency: dict[str, float]) -> str:
    return f"{latency['latency_ms_p90']:.2f}"


def _verdict(text: str) -> str:
    """Return a target's verdict and how many rules it rests on; the rules are on the run's page."""
    said, _, reasons = text.partition(": ")
    if said == "ship":
        return said
    open_rules = [r for r in reasons.split("; ") if ": cannot tell" in r or ": fails" in r]
    if open_rules:
        return f"{said}: {len(open_rules)} of its rules"
    return text

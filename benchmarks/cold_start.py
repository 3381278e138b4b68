"""Cold start: from the start of a process to the printed answer, and the memory that takes.

`edgeclip classify` opens an int8 bundle with a MobileCLIP2-S0-shaped image tower and ranks ten
baked labels for one image. Two peers do the same:

    open_clip         torch and open_clip, the fp32 checkpoint (8 s and 1,100 MiB seen)
    bare onnxruntime  numpy, PIL and ONNX Runtime on the bundle's own model file, with nothing around it: the limit

The weights are random: neither time nor memory depends on their values. Text features are baked on
all sides and the page cache is warm (each peer ran once, untimed). Time is taken when the answer
arrives in the pipe, memory is the peak resident set of the whole process.

What bounds it: importing numpy and ONNX Runtime, and ONNX Runtime's optimization of the graph; both
are in the bare script too. What edgeclip adds is its imports, the command line, and the sha256 of
the files it opens.

The bundle's form is the shipped target's first one (every product that the policy allows, minmax):
random weights answer every image almost alike, so the search could judge nothing.

Required: at least 12 times as fast as open_clip in at most 0.12 of its memory; at most 1.4 times
the time and memory of the bare script. 30 rounds; with --quick open_clip takes part in three of
them only, which judges nothing. --smoke has a tiny ViT in place of MobileCLIP2-S0.

    python benchmarks/cold_start.py --work /tmp/cold     # keeps checkpoint and bundle there for the next call
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import compare
import toy
import yaml

MODELS = {"whole": "MobileCLIP2-S0", "quick": "MobileCLIP2-S0", "smoke": "tiny.json"}
LABELS = (
    "a cat",
    "a dog",
    "a car",
    "a tree",
    "a house",
    "a boat",
    "a bird",
    "a cup",
    "a shoe",
    "a clock",
)
CALIBRATION = {
    "images": 24,
    "judged_on": 16,
    "methods": ["minmax"],
    "smoothing": [None],
    "layers": ["all"],
}
CALIBRATION |= {
    "judged_cosine_p1": -1.0,
    "probe_layers": 0,
    "min_int8_share": 0.0,
    "min_speedup": 0.0,
}
TOLERANCE = {
    "centered_cosine_p1": -1.0,  # random weights answer almost alike: less the mean that is noise
    "top1_agreement": 0.0,
    "agreement_where_right": None,
    "accuracy_drop_pp": 100.0,
}
IMAGES = 40
ROUNDS = {"whole": 30, "quick": 30, "smoke": 2}
PEERS = Path(__file__).parent / "cold_start_peers"
TARGETS = Path(__file__).parent.parent / "export"
EDGECLIP = (str(Path(sys.executable).with_name("edgeclip")),)


def prepare(work: Path, model: str) -> None:
    """Images, labels and a checkpoint, in a process of its own so that the measuring one stays
    small.
    """
    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    (work / "images").mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):  # smooth blobs with a little grain, of a phone image's proportions
        blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = np.clip(np.asarray(blobs, np.int16) + rng.integers(-12, 13, (480, 640, 3)), 0, 255)
        Image.fromarray(grain.astype(np.uint8)).save(work / "images" / f"{i:02d}.jpg", quality=90)
    (work / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    if model.endswith(".json"):
        vision = toy.CONFIG["vision_cfg"] | {
            "image_size": 256,
            "patch_size": 64,
        }  # the peers' input
        tiny = toy.CONFIG | {"vision_cfg": vision}
        (work / model).write_text(json.dumps(tiny), encoding="utf-8")
        open_clip.add_model_config(work / model)
    built = open_clip.create_model(Path(model).stem, pretrained=None)
    save_file(built.state_dict(), work / "model.safetensors")


def target(work: Path) -> Path:
    """Write onnx-int8 as a target of this benchmark's own: one form, few images, nothing asked of
    random weights.
    """
    shipped = yaml.safe_load((TARGETS / "onnx-int8.yaml").read_text(encoding="utf-8"))
    own = shipped | {"calibration": CALIBRATION, "tolerance": shipped["tolerance"] | TOLERANCE}
    path = work / "onnx-int8.yaml"
    path.write_text(yaml.safe_dump(own), encoding="utf-8")
    return path


def model_name(work: Path, form: str) -> str:
    """Return what open_clip and edgeclip call the model: a name, or the file of its
    configuration.
    """
    name = MODELS[form]
    if name.endswith(".json"):
        return str(work / name)
    return name


def bundle(work: Path, form: str) -> Path:
    """Return the int8 bundle below `work`, exported by edgeclip itself unless an earlier call left
    it there.
    """
    folder = work / "bundles" / "onnx-int8"
    if not (folder / "manifest.json").exists():
        print(f"making a {MODELS[form]} checkpoint and its int8 bundle in {work}", file=sys.stderr)
        subprocess.run([sys.executable, __file__, "--prepare", str(work), MODELS[form]], check=True)
        source = ["--model", model_name(work, form), "--weights", str(work / "model.safetensors")]
        source += [
            "--like",
            "default",
            "--labels",
            str(work / "labels.txt"),
            "--images",
            str(work / "images"),
        ]
        to = ["--target", str(target(work)), "--out", str(work / "bundles")]
        subprocess.run([*EDGECLIP, "export", *source, *to], check=True, stdout=sys.stderr)
    return folder


def run(command: list[str]) -> dict[str, Any]:
    """One cold start: seconds to the first bytes of the answer and to the end, peak MiB, and the
    answer itself.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        assert process.stdout
        answer = process.stdout.read(1 << 16) or b""
        printed = time.perf_counter() - start
        answer += process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(
                f"{' '.join(command)} ended with code {process.returncode}:\n{errors.read().decode()[-2000:]}"
            )
    return {
        "seconds": printed,
        "seconds_to_exit": ended,
        "memory_mib": usage.ru_maxrss / 1024,
        "answer": answer.decode(),
    }


def ranking(answer: str) -> list[str]:
    """The labels of an answer, best first."""
    found = [(line, label) for line in answer.splitlines() for label in LABELS if label in line]
    return [label for _, label in found]


def commands(work: Path, form: str) -> dict[str, list[str]]:
    folder, image = bundle(work, form), str(work / "images" / "00.jpg")
    baked = [str(folder / "class_features.npy"), str(folder / "labels.json"), image]
    return {
        "edgeclip classify": [*EDGECLIP, "classify", image, "--bundle", str(folder)],
        "bare onnxruntime": [
            sys.executable,
            str(PEERS / "bare_onnxruntime.py"),
            str(folder / "image_encoder.onnx"),
            *baked,
        ],
        "open_clip": [
            sys.executable,
            str(PEERS / "open_clip_torch.py"),
            model_name(work, form),
            str(work / "model.safetensors"),
            *baked,
        ],
    }


def measure(work: Path, options: Any) -> None:
    here = common.this_machine()
    sides = commands(work, options.form)
    first = {name: run(command) for name, command in sides.items()}
    ranked = {name: ranking(result["answer"]) for name, result in first.items()}
    ours, bare, torch_ = sides
    assert len(ranked[ours]) == 5 and ranked[ours] == ranked[bare], (
        f"edgeclip and the bare script disagree: {ranked}"
    )

    def cold(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: {k: v for k, v in run(sides[name]).items() if k != "answer"}

    seldom = {torch_: 10} if options.form == common.QUICK else None
    rounds = compare.interleave(
        {name: cold(name) for name in sides}, ROUNDS[options.form], every=seldom
    )
    rows, figures = [], {}
    for name in sides:
        figures[name] = {
            f: compare.interval(compare.column(rounds, name, f))._asdict()
            for f in ("seconds", "seconds_to_exit", "memory_mib")
        }
        seconds, ended, memory = (
            compare.interval(compare.column(rounds, name, f))
            for f in ("seconds", "seconds_to_exit", "memory_mib")
        )
        rows.append(
            [
                name,
                str(seconds),
                f"{ended.median:.3g}",
                f"{memory.median:.0f}",
                seconds.n,
                ", ".join(ranked[name][:2]),
            ]
        )
    common.table(
        rows,
        ["cold start", "s to the answer (95 %)", "s to exit", "peak MiB", "runs", "first answers"],
    )
    small = common.this_process_mib()
    assert all(figures[name]["memory_mib"]["median"] > small for name in sides), (
        f"this process ({small:.0f} MiB) hides its children's memory"
    )
    required = [
        compare.judge(
            "times as fast as open_clip",
            compare.ratios(rounds, torch_, ours, "seconds"),
            at_least=12,
        ),
        compare.judge(
            "of open_clip's memory",
            compare.ratios(rounds, ours, torch_, "memory_mib"),
            at_most=0.12,
        ),
        compare.judge(
            "of the bare script's time", compare.ratios(rounds, ours, bare, "seconds"), at_most=1.4
        ),
        compare.judge(
            "of the bare script's memory",
            compare.ratios(rounds, ours, bare, "memory_mib"),
            at_most=1.4,
        ),
    ]
    common.finish(
        {
            "benchmark": "cold_start",
            "cold_start": figures,
            "same_first_answer_as_open_clip": ranked[ours][0] == ranked[torch_][0],
        },
        required,
        here,
        options,
    )


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--work",
        type=Path,
        help="folder that keeps checkpoint and bundle  [default: a temporary one]",
    )
    parser.add_argument(
        "--prepare",
        nargs=2,
        help="internal: only make images, labels and checkpoint, of FOLDER and MODEL",
    )
    options = parser.parse_args()
    if options.prepare:
        folder, model = options.prepare
        prepare(Path(folder), model)
    elif options.work:
        measure(options.work.resolve(), options)
    else:
        with tempfile.TemporaryDirectory(prefix="edgeclip-cold-start-") as folder:
            measure(Path(folder), options)


if __name__ == "__main__":
    main()

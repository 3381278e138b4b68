"""CLIP_benchmark as judge: does it count the images that edgeclip counts, to the last one?

CLIP_benchmark 1.6.2 from the package index, unchanged, in an environment of its own, started by
`python -m edgeclip.clip_benchmark`: it reads the test images of the run's own data set, makes the
prompts, multiplies and counts. Ours are the same shards through edgeclip's reader and
`Bundle.scores`, what `classify` answers: over all labels, with the EduAttention and the class
offset that ship. Shared by both: the graph and its runtime, resize and crop, the head's arithmetic
up to the product. Not shared: reading and decoding shards, labels, the classifier, product,
ranking, count.

What bounds it: the score is a float32 sum here and a float64 sum there, so an image whose two best
labels are nearer than about 1e-6 may fall either way; the least lead of each bundle is given.

Required: the same number of images right at first, for every run and target.

    python benchmarks/clip_benchmark.py --run runs/clothing --run runs/grocery --check \\
        --json results/clip_benchmark.json

--environment names a folder with CLIP_benchmark, made there where it is not; without it a temporary
one is made. --quick takes the first target only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import compare
import environments
import numpy as np

from edgeclip.device.bundle import Bundle
from edgeclip.device.images import index_tar, load_pixels
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R

REPO = Path(__file__).parent.parent
TARGETS = ("onnx-fp32", "onnx-int8", "openvino-int8")
BATCH = 64


def ours(bundle: Bundle, data: Path) -> dict[str, Any]:
    """Return how many test images there are, how many are right at first and among five, and the
    least lead.
    """
    scores, labels = [], []
    for shard in sorted((data / "test").glob("*.tar")):
        images = index_tar(shard)
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            pixels = np.stack([load_pixels(image, bundle.preprocess) for image in batch])
            scores.append(bundle.scores(bundle.encode_pixels(pixels)))
            labels += [image.label for image in batch]
    every = np.concatenate(scores)
    ranked = np.argsort(-every, axis=1, kind="stable")
    right = ranked == np.array(labels)[:, None]
    best = np.sort(every, axis=1)
    return {
        "images": len(labels),
        "top1": int(right[:, 0].sum()),
        "top5": int(right[:, :5].sum()),
        "least_lead": float((best[:, -1] - best[:, -2]).min()),
    }


def theirs(python: Path, bundle: Bundle, name: str, data: Path) -> dict[str, float]:
    """Return what CLIP_benchmark writes of the bundle: acc1, acc5 and mean_per_class_recall,
    0..1.
    """
    with tempfile.TemporaryDirectory(prefix="edgeclip-judge-") as folder:
        command = [python, "-m", "edgeclip.clip_benchmark", "eval", "--model_type", "edgeclip"]
        command += ["--model", bundle.folder, "--pretrained", "", "--dataset", f"wds/{name}"]
        command += ["--dataset_root", data, "--task", "zeroshot_classification", "--no_amp"]
        command += ["--num_workers", "1", "--quiet", "--output", f"{folder}/theirs.json"]
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"CLIP_benchmark ended with exit code {done.returncode}")
        return json.loads(Path(folder, "theirs.json").read_text(encoding="utf-8"))["metrics"]


def compared(python: Path, run: Path, target: str) -> dict[str, Any]:
    """Return both sides' counts of one bundle."""
    data = R.of_run(run).data
    root = Path(data.root).resolve()
    bundle = Bundle.load(run / "bundles" / target, check=True)
    own = ours(bundle, root)
    other = theirs(python, bundle, data.name, root)
    row = {"run": data.name, "target": target, **own, "labels": len(bundle.labels)}
    for ours_key, key in (("top1", "acc1"), ("top5", "acc5")):
        count = other[key] * own["images"]
        if abs(count - round(count)) > 1e-6:
            sys.exit(f"{run}, {target}: CLIP_benchmark's {key} is no count of {own['images']}")
        row[f"{ours_key}_clip_benchmark"] = round(count)
    row["class_offset"] = float(np.max(bundle.offsets, initial=0.0))
    row["edu_attention"] = 0.0 if bundle.head is None else bundle.head.alpha
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def measure(python: Path, runs: list[Path], options: argparse.Namespace) -> None:
    """Compare every bundle; print the table and the JSON."""
    here = common.this_machine()
    targets = TARGETS[:1] if options.form == common.QUICK else TARGETS
    rows = [compared(python, run, target) for run in runs for target in targets]
    cells = []
    required = []
    for r in rows:
        both = [f"{r[key]} / {r[f'{key}_clip_benchmark']}" for key in ("top1", "top5")]
        cells.append([r["run"], r["target"], r["images"], *both, f"{r['least_lead']:.1e}"])
        differing = abs(r["top1"] - r["top1_clip_benchmark"])
        what = f"{r['run']}, {r['target']}: images of top-1 that differ"
        required.append(compare.exact(what, differing, n=r["images"], at_most=0))
    headers = ["run", "target", "images", "top-1 ours / theirs", "top-5 ours / theirs"]
    common.table(cells, [*headers, "least lead of a first answer"])
    peer = environments.CLIP_BENCHMARK[0]
    figures = {"benchmark": "clip_benchmark", "peer": peer, "rows": rows}
    common.finish(figures, required, here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--run", action="append", type=common.absolute, help="a run with its bundles; repeat it"
    )
    parser.add_argument("--environment", type=common.absolute, metavar="FOLDER")
    options = parser.parse_args()
    if not options.run and options.form != common.SMOKE:
        parser.error("give --run, once or several times")
    named = options.environment or os.environ.get("EDGECLIP_CLIP_BENCHMARK")
    try:
        with tempfile.TemporaryDirectory(prefix="edgeclip-judge-") as folder:
            environment = Path(named or Path(folder) / "environment")
            python = environments.make(environment, environments.CLIP_BENCHMARK)
            if options.run:
                measure(python, options.run, options)
                return
            toy = argparse.Namespace(run=None, form=options.form)
            with common.measured_run(toy, TARGETS) as run:
                measure(python, [run], options)
    except subprocess.CalledProcessError as e:
        wanted = " ".join(environments.CLIP_BENCHMARK)
        print(f"clip_benchmark is not installed: pip install {wanted} ({e})", file=sys.stderr)
        sys.exit(common.EXIT_UNAVAILABLE)
    except EdgeclipError as e:
        sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()

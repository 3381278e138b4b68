"""Is a bundle on an ARM core the model that it is on x86? The same bundle, photos and onnxruntime
version on both sides.

`arm64-emulated` runs aarch64 code under qemu behind an sshd, `loopback` the same way on this
machine's own processor, both with onnxruntime 1.26.0. Compared are the features of each photo, then
the answers over the run's own classes. No time is taken: an emulator's says nothing about a board.

What bounds it: float additions in another order. fp32 differs in the last bits; int8 sums are
exact, so a difference there comes from a float on a rounding boundary, and moves a whole step
(docs/devices.md says which). The run may be of any student, a convolutional one or a ViT, that has
the two bundles.

Required: fp32 cosine at least 0.99999 on every photo; S8S8 the same first answer on every photo
whose two best scores differ by 1e-3 or more on x86; a core without dot-product (cortex-a72) and one
with it (cortex-a76) told apart by the machine's facts.

    python benchmarks/emulated.py --run runs/clothing --check       # bundles onnx-fp32 and onnx-int8-arm; 200 photos take a quarter of an hour
"""

import sys
from pathlib import Path
from typing import Any

import common
import compare
import msgspec
import numpy as np

from edgeclip.boards.board import Board
from edgeclip.device import profile as D
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import Evaluation, decide, load_evaluation
from edgeclip.device.machine import Facts
from edgeclip.device.validate import Observed
from edgeclip.errors import EdgeclipError

VERSION = "onnxruntime==1.26.0"
PHOTOS = {"whole": 200, "quick": 24, "smoke": 4}
MARGIN = 1e-3
TARGETS = ("onnx-fp32", "onnx-int8-arm")


def observed(
    name: str, cpu: str | None, bundles: list[Bundle], evaluation: Evaluation | None
) -> tuple[list[Observed], Facts]:
    _, device = D.load(name)
    device = msgspec.structs.replace(
        device, packages=(VERSION,), reach=msgspec.structs.replace(device.reach, emulate=cpu)
    )
    with Board(name, device) as board:
        if not bundles:
            return [], board.facts
        board.prepare(bundles, evaluation)
        return [board.observe(b, evaluation) for b in bundles], board.facts


def measure(run: Path, options: Any) -> None:
    here = common.this_machine()
    evaluation = load_evaluation(run / "evaluation", PHOTOS[options.form])
    bundles = [Bundle.load(run / "bundles" / t, check=True) for t in TARGETS]
    x86, _ = observed("loopback", None, bundles, evaluation)
    arm, facts = observed("arm64-emulated", "cortex-a76", bundles, evaluation)
    _, without = observed("arm64-emulated", "cortex-a72", [], None)
    rows, figures = [], {}
    for bundle, a, b in zip(bundles, x86, arm, strict=True):
        name, n = bundle.folder.name, len(evaluation.chosen)
        fa, fb = a.arrays["features_all"], b.arrays["features_all"]
        assert (
            fa.shape == fb.shape == (n, bundle.manifest.embed_dim)
            and a.ran.version == b.ran.version == VERSION.split("==")[1]
        )
        cosine = (
            (fa.astype(np.float64) * fb).sum(axis=1)
            / np.linalg.norm(fa.astype(np.float64), axis=1)
            / np.linalg.norm(fb.astype(np.float64), axis=1)
        )
        margin = decide(bundle, evaluation, fa).lead
        unlike = a.arrays["answers"] != b.arrays["answers"]
        figures[name] = {
            "photos": n, "cosine_min": float(cosine.min()), "largest_difference": float(np.abs(fa - fb).max()), "identical_photos": int((fa == fb).all(axis=1).sum()),
            "other_answer": int(unlike.sum()), "other_answer_by_margin": int((unlike & (margin >= MARGIN)).sum()), "closer_than_margin": int((margin < MARGIN).sum()),
        }  # fmt: skip
        rows.append([name, *(figures[name][k] for k in figures[name])])
    common.table(
        rows,
        [
            "bundle",
            "photos",
            "cosine min",
            "largest difference",
            "identical",
            "other answer",
            f"of those by {MARGIN:g} or more",
            f"photos closer than {MARGIN:g}",
        ],
    )
    required = [
        compare.exact(
            "onnx-fp32: cosine min", figures["onnx-fp32"]["cosine_min"], at_least=0.99999
        ),
        compare.exact(
            "onnx-int8-arm: other answers by 1e-3 or more",
            figures["onnx-int8-arm"]["other_answer_by_margin"],
            at_most=0,
        ),
        compare.exact(
            "dot-product seen on cortex-a76, not on cortex-a72",
            float("asimddp" in facts.isa and "asimddp" not in without.isa),
            at_least=1,
        ),
    ]
    common.finish(
        {
            "benchmark": "emulated",
            "bundles": figures,
            "isa": {"cortex-a76": facts.isa, "cortex-a72": without.isa},
        },
        required,
        here,
        options,
    )


def main() -> None:
    parser = common.arguments(__doc__)
    common.run_argument(parser)
    options = parser.parse_args()
    common.require_board()
    common.require("apt install qemu-user-static", program="qemu-aarch64-static")
    common.require("apt install debootstrap", program="debootstrap")
    try:
        with common.measured_run(options, TARGETS) as run:
            measure(run, options)
    except EdgeclipError as e:
        sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()

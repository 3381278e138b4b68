"""What a target costs in accuracy, over several runs together: pooled drop, its 95 % limit, and who
keeps the right answers.

Reads the parity reports that `edgeclip validate` left in each run, one a target; nothing is
measured here. Images of all runs are pooled as one sample: a drop is (right before and wrong after,
minus the other way round) over all images, its limit that of edgeclip/device/metrics.py. An image
that float32 answers rightly and the target otherwise is a lost one, so the agreement on those is 1
- lost / right. A run counts by its headline sets only: test images, each once.

    edgeclip distill recipes/clothing.yaml --data DIR ; edgeclip export --run runs/clothing --target
    onnx-int8 ; edgeclip validate --run runs/clothing
    python benchmarks/parity.py --run runs/clothing --run runs/grocery --check
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import common
import compare

from edgeclip import disk
from edgeclip.device.metrics import paired_drop
from edgeclip.device.records import to_json


def counted(name: str, target: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """reports: parity reports; their images are pooled, those that took no part in training."""
    sets = [s for r in reports for s in r["sets"] if s["role"] == "unseen" and not s["at_floor"]]
    n, lost, won = (int(sum(s[k] for s in sets)) for k in ("images", "lost", "won"))
    right = round(sum(s["reference_top1"] * s["images"] for s in sets))
    if right == 0:
        sys.exit(
            f"{name}, {target}: float32 answers no image rightly, so none can be kept; give a trained run"
        )
    drop = paired_drop(lost, won, n)
    return {
        "runs": name,
        "target": target,
        "images": n,
        "float32_r1": right / n,
        "target_r1": (right - lost + won) / n,
        **to_json(drop),
        "kept": 1 - lost / right,
    }


def measure(runs: list[Path], options: argparse.Namespace) -> None:
    here = common.this_machine()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for path in sorted((run / "reports").glob(f"*.{options.device}.parity.json")):
            report = disk.read_json(path)
            if report["accuracy"] is not None:
                found.setdefault(report["target"], {})[run.name] = report
    rows = []
    for target, reports in found.items():
        rows += [counted(name, target, [report]) for name, report in reports.items()]
        if len(reports) == len(runs) > 1:
            rows.append(counted("pooled", target, list(reports.values())))
    shown = {
        "target": "",
        "runs": "",
        "images": "",
        "float32_r1": ".4f",
        "target_r1": ".4f",
        "drop_pp": ".2f",
        "upper_pp": ".2f",
        "kept": ".4f",
    }
    cells = [[format(row[c], form) for c, form in shown.items()] for row in rows]
    common.table(
        cells,
        [
            "target",
            "run",
            "images",
            "R@1 float32",
            "R@1 target",
            "drop, pp",
            "95 % limit, pp",
            "same answer where float32 is right",
        ],
    )
    required = []
    for row in rows:
        if row["runs"] == "pooled" or len(runs) == 1:
            required.append(
                compare.exact(
                    f"{row['target']}, {row['runs']}: drop, pp",
                    row["drop_pp"],
                    n=row["images"],
                    at_most=0.5,
                )
            )
            required.append(
                compare.exact(
                    f"{row['target']}, {row['runs']}: its 95 % limit, pp",
                    row["upper_pp"],
                    n=row["images"],
                    at_most=1.0,
                )
            )
            required.append(
                compare.exact(
                    f"{row['target']}, {row['runs']}: kept where float32 is right",
                    row["kept"],
                    n=row["images"],
                    at_least=0.98,
                )
            )
    common.finish({"benchmark": "parity", "rows": rows}, required, here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--run",
        action="append",
        type=Path,
        help="a run that was exported and validated; several are pooled",
    )
    parser.add_argument("--device", default="host-cpu")
    options = parser.parse_args()
    if options.run:
        measure(options.run, options)
    elif options.form == common.SMOKE:
        with common.measured_run(
            argparse.Namespace(run=None, form=options.form), ("onnx-int8",), validated=True
        ) as run:
            measure([run], options)
    else:
        parser.error("give --run, once or several times")


if __name__ == "__main__":
    main()

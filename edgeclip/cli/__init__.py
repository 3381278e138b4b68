"""The command line: parse, call the library, print. Results go to stdout as a table or JSON, progress to stderr.

The host layer (torch) is imported inside the commands that need it, so `edgeclip --help` answers at once.
Exit codes: 0; 1 a user's mistake; 2 a malformed command line; 3 a gate failed; 4 too few images to tell;
130 and 143 interrupted.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from edgeclip.cli import bundle as cli_bundle
from edgeclip.cli import cache as cli_cache
from edgeclip.cli import device as cli_device
from edgeclip.cli import tables
from edgeclip.cli.options import json_option, label_file, say
from edgeclip.errors import EdgeclipError, Interrupted, Refused
from edgeclip.progress import first

GO_ON = "nothing half-written is left; run the same command again (distill and cache build go on from the last finished stage)"


class _Group(click.Group):
    """One boundary where a user's mistake becomes one line, and a signal its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminated)
        try:
            return super().invoke(ctx)
        except Refused as e:
            from edgeclip.reports.store import GATE_FAILED

            click.echo(f"Refused: {' '.join(str(e).split())}", err=True)
            sys.exit(GATE_FAILED)
        except EdgeclipError as e:
            raise click.ClickException(" ".join(str(e).split())) from None
        except Interrupted as e:
            if first():
                click.echo(str(e), err=True)
            sys.exit(128 + e.number)
        except KeyboardInterrupt:
            click.echo(f"Interrupted: {GO_ON}.", err=True)
            sys.exit(130)
        except ModuleNotFoundError as e:
            extra = HOST_PACKAGES.get((e.name or "").split(".")[0])
            if extra is None:
                raise
            raise click.ClickException(
                f"{ctx.invoked_subcommand}: {e.name} is not installed; pip install 'edgeclip[{extra}]'"
            ) from None


HOST_PACKAGES = {
    p: "train"
    for p in (
        "torch",
        "torchvision",
        "open_clip",
        "timm",
        "onnx",
        "onnxruntime",
        "jaxtyping",
        "safetensors",
        "jinja2",
        "matplotlib",
        "pyarrow",
    )
}


def _terminated(*_: object) -> NoReturn:
    click.echo(f"Terminated: {GO_ON}.", err=True)
    sys.exit(143)


@click.group(
    cls=_Group, context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="edgeclip")
def main() -> None:
    """Take a large CLIP to a small board, and prove that it arrived."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "roots",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Where the data lies on this machine; may be repeated.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe name>]"
)
@click.option("--fresh", is_flag=True, help="Start over instead of resuming.")
@json_option
def distill(
    recipe: Path, roots: tuple[str, ...], out: Path | None, fresh: bool, as_json: bool
) -> None:
    """Distil a teacher into a student, as RECIPE says. The same line again resumes.

    \b
    Examples:
        edgeclip distill recipes/quickstart.yaml
        torchrun --nproc-per-node 8 -m edgeclip distill recipes/mobile.yaml
    """
    from edgeclip.host.distill import run as host

    results = host.distill(recipe, roots, out, fresh)
    if not results:  # one of several processes, and not the one that reports
        return
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    tables.accuracy(results)


LAYOUTS = ("bundle", "optimum", "open_clip")


@main.command()
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="A name from `edgeclip list targets`, or a YAML file; may be repeated.",
)
@click.option("--run", type=click.Path(path_type=Path), help="Run folder.  [default: runs/latest]")
@click.option(
    "--vocabulary",
    type=click.Path(path_type=Path),
    help="Keep only the text tokens of labels, templates and the texts in this file, one a line.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="bundle",
    show_default=True,
    help="optimum, open_clip: folders that those libraries load.",
)
@click.option(
    "--no-head",
    is_flag=True,
    help="Of --layout optimum: leave EduAttention out, class scores are plain cosines.",
)
@click.option(
    "--model",
    help="Instead of a run: any open_clip model (a name, or a JSON file of its configuration) or timm classifier.",
)
@click.option("--weights", help="Of --model: a file, random, pip:PACKAGE or hub:TAG.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Of --model: a file, one label a line."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Of --model: a folder of images for calibration and golden answers.",
)
@click.option("--image-only", is_flag=True, help="Of --model: leave the text encoder out.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of what is written.  [default: <run>/bundles, or bundles/<model>; of another layout <run>/<layout>]",
)
@json_option
def export(
    targets: tuple[str, ...],
    run: Path | None,
    vocabulary: Path | None,
    layout: str,
    no_head: bool,
    model: str | None,
    weights: str | None,
    labels: Path | None,
    images: Path | None,
    image_only: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Export a student, or any checkpoint, to one or more targets.

    \b
    Examples:
        edgeclip export --target onnx-int8 --target openvino-int8
        edgeclip export --target onnx-int8 --layout optimum
        edgeclip export --layout open_clip
        edgeclip export --model MobileCLIP2-S0 --weights model.safetensors --labels labels.txt --target onnx-fp32
    """
    if bool(model) != bool(weights):
        raise click.UsageError("--model and --weights go together")
    if model and run:
        raise click.UsageError("--model and --run exclude each other")
    for option, given in (("--labels", labels), ("--images", images), ("--image-only", image_only)):
        if given and not model:
            raise click.UsageError(f"{option} belongs to --model")
    if bool(targets) == (layout == "open_clip"):
        raise click.UsageError(
            "--layout open_clip is the float student, without --target"
            if targets
            else "Missing option '--target'."
        )
    if layout == "open_clip" and model:
        raise click.UsageError("--layout open_clip is for a run's student")
    if no_head and layout != "optimum":
        raise click.UsageError("--no-head belongs to --layout optimum")
    if vocabulary and layout != "bundle":
        raise click.UsageError("--vocabulary belongs to --layout bundle")
    from edgeclip.device import target as T
    from edgeclip.device.manifest import read_manifest
    from edgeclip.device.records import to_json

    loaded = [T.load(t) for t in targets]
    from edgeclip.host.export import export as write
    from edgeclip.host.export import open_clip, optimum
    from edgeclip.host.export.source import from_model, from_run, with_vocabulary
    from edgeclip.reports.store import latest_run

    if model and weights:
        source = from_model(
            model, weights, label_file(labels) if labels else [], images, text=not image_only
        )
        home = {
            kind: Path(kind) / model.removesuffix(".json").replace("/", "_")
            for kind in ("bundles", "optimum")
        }
    else:
        run = latest_run(run)
        source, home = (
            from_run(run),
            {kind: run / kind for kind in ("bundles", "optimum", "open_clip")},
        )
        if layout == "open_clip":
            path = open_clip.write(run, source, (out or home[layout]) / run.name)
            say(
                as_json,
                {"open_clip": str(path)},
                f'open_clip.create_model_and_transforms("local-dir:{path}")',
            )
            return
    if vocabulary:
        source = with_vocabulary(source, label_file(vocabulary))
    if layout == "optimum":
        for name, target in loaded:
            optimum.check(
                target.runtime, source.load_text is not None, None if no_head else source.head, name
            )
    rows = []
    for name, target in loaded:
        path = write(
            source, name, target, (out if out and layout == "bundle" else home["bundles"]) / name
        )
        manifest = read_manifest(path)
        if layout == "optimum":
            path = optimum.write(path, (out or home[layout]) / name, head=not no_head)
        rows.append(
            {
                "target": name,
                "image_encoder_mib": manifest.image_encoder_bytes / 2**20,
                layout: str(path),
                "lint": to_json(manifest.lint),
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    tables.bundles(rows, layout)


PROTOCOLS = ("zero_shot", "base_to_novel", "cross_dataset", "domain_generalization", "retrieval")


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--protocol", type=click.Choice(PROTOCOLS), required=True, help="How to score it.")
@click.option(
    "--data",
    "given",
    multiple=True,
    metavar="SET",
    help="NAME=DIR, a folder in CLIP_benchmark's layout, or a YAML file; may be repeated.",
)
@json_option
def evaluate(run: Path | None, protocol: str, given: tuple[str, ...], as_json: bool) -> None:
    """Score RUN's student, and its teacher beside it, on the run's own test images or on other sets.

    \b
    Example:
        edgeclip evaluate runs/clothing --protocol base_to_novel --data clothing=path/to/clothing
    """
    from edgeclip.host.evaluation.protocols import evaluate as score
    from edgeclip.reports.store import latest_run

    record = score(latest_run(run), protocol, given)
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    tables.protocol(record)


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@json_option
def report(run: Path | None, as_json: bool) -> None:
    """Write RUN's report.html: what was lost at which step, and ship or do not ship.

    \b
    Example:
        edgeclip report runs/quickstart
    """
    from edgeclip.reports.html import report as write
    from edgeclip.reports.store import latest_run

    path, verdicts = write(latest_run(run))
    lines = [f"{target}: {verdict}" for target, verdict in verdicts.items()]
    say(as_json, {"report": str(path), "verdicts": verdicts}, "\n".join([*lines, str(path)]))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The recipe's path.  [default: <folder name>.yaml]",
)
@json_option
def init(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write a complete recipe for FOLDER, which has photos in one sub-folder a class.

    \b
    Example:
        edgeclip init ~/photos && edgeclip distill photos.yaml
    """
    from edgeclip.host.recipe.starter import write_recipe

    path, classes = write_recipe(folder, out)
    say(
        as_json,
        {"recipe": str(path), "classes": classes},
        f"{path}: {classes} classes; next: edgeclip distill {path}",
    )


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "target_name",
    required=True,
    help="A TensorRT target: a name from `edgeclip list targets`, or a YAML file.",
)
@json_option
def lint(file: Path, target_name: str, as_json: bool) -> None:
    """Would TensorRT take this ONNX file? Names the node and the cure for each refusal; needs no GPU.

    \b
    Exits 3 when it would not.
    Example:
        edgeclip lint model.onnx --target tensorrt-int8
    """
    from edgeclip.device import target as T

    _, target = T.load(target_name)
    from edgeclip.host.export.lint import lint as check
    from edgeclip.reports.store import GATE_FAILED

    verdict = check(file, target)
    checked = (
        verdict["checked_by"]
        or "the rules alone; for TensorRT's own parser and builder: pip install 'edgeclip[lint]'"
    )
    legal = "legal; what it computes and how fast, `validate` and `bench` on the board say"
    say(
        as_json,
        verdict,
        "\n".join([*(verdict["errors"] or [f"{file}: {legal}"]), f"checked by {checked}"]),
    )
    sys.exit(GATE_FAILED if verdict["errors"] else 0)


@main.command("list")
@click.argument("kind", type=click.Choice(["recipes", "targets", "devices"]), required=False)
@json_option
def list_(kind: str | None, as_json: bool) -> None:
    """Name the recipes, targets and devices that ship.

    \b
    Example:
        edgeclip list targets
    """
    from edgeclip.boards.doctor import purpose

    rows = [
        (k.rstrip("s"), *row)
        for k in ([kind] if kind else ["recipes", "targets", "devices"])
        for row in purpose(k.rstrip("s"))
    ]
    if as_json:
        click.echo(
            json.dumps(
                [{"kind": k, "name": n, "purpose": p, "path": f} for k, n, p, f in rows], indent=1
            )
        )
        return
    tables.table([[k, n, p] for k, n, p, _ in rows], ["kind", "name", "purpose"])


COMMANDS = (
    cli_bundle.classify,
    cli_bundle.labels,
    cli_bundle.embed,
    cli_cache.cache,
    cli_device.validate,
    cli_device.bench,
    cli_device.doctor,
    cli_device.selftest,
)
for command in COMMANDS:
    main.add_command(command)

"""The commands that use one bundle: classify, labels, embed. They need no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeclip.cli import complete
from edgeclip.cli import words as given
from edgeclip.cli.group import command
from edgeclip.cli.options import IMAGE, PATH, bundle_option, json_option, print_json, say
from edgeclip.cli.tables.bundles import ranking
from edgeclip.errors import EdgeclipError

if TYPE_CHECKING:
    from edgeclip.cli.over_images import Answers


@command()
@click.argument("images", nargs=-1, required=True, type=IMAGE)
@bundle_option
@click.option(
    "--labels",
    help=f"{given.HELP}  [default: the baked labels]",
    shell_complete=complete.labels,
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many labels to print per image.",
)
@click.option("--no-offset", is_flag=True, help="Leave the bundle's class offset out.")
@json_option
def classify(
    images: tuple[Path, ...],
    bundle: Path | None,
    labels: str | None,
    top: int,
    no_offset: bool,
    as_json: bool,
) -> None:
    """Rank labels for each of IMAGES.

    Of several images those that cannot be read are skipped, named and counted.

    \b
    Examples:
        edgeclip classify cat.jpg --labels "a cat, a dog, a car"
        edgeclip classify photos/*.jpg --labels @labels.txt
    """
    from edgeclip.cli.over_images import classify_all

    active = None
    if labels is not None:
        active = given.labels(labels)
    found = classify_all(images, bundle, active, top, offset=not no_offset)
    if as_json:
        print_json(_with_skipped(found))
    else:
        ranking(found.answers)


def _with_skipped(found: "Answers") -> dict[str, Any]:
    """Every image's answer, null of one that was skipped, in the order in which they were given."""
    return {image: found.answers.get(image) for image in found.images}


@command()
@click.argument("bundle", type=PATH)
@click.argument("labels", metavar="LABELS")
@click.option("--out", type=PATH, help="Folder of the new bundle.  [default: BUNDLE-labels]")
@click.option("--in-place", is_flag=True, help="Replace BUNDLE instead.")
@click.option("--no-offset", is_flag=True, help="Leave the class offset out of the new bundle.")
@json_option
def labels(
    bundle: Path, labels: str, out: Path | None, in_place: bool, no_offset: bool, as_json: bool
) -> None:
    """Write a bundle that is BUNDLE with other LABELS; no retraining.

    LABELS are words between commas, or @FILE, one a line. A label that had labels in training keeps
    its class offset; a new one has none.

    \b
    Examples:
        edgeclip labels runs/latest/bundles/onnx-int8 @fruit.txt --out fruit-bundle
        edgeclip labels fruit-bundle "an apple, a pear" --in-place
    """
    from edgeclip.device.bundle import Bundle, bake_labels

    new = given.labels(labels, "LABELS")
    path = bake_labels(bundle, new, _place(bundle, out, in_place), offset=not no_offset)
    known = Bundle.load(path).manifest.class_offset
    keep: list[str] = []
    if known is not None:
        keep = sorted(set(known.labels) & set(new))
    line = f"{path}: {len(new)} labels"
    if known is not None:
        line += f", {len(keep)} of which keep the class offset {known.offset:+.4f}"
    say(as_json, {"bundle": str(path), "labels": new, "with_class_offset": keep}, line)


def _place(bundle: Path, out: Path | None, in_place: bool) -> Path:
    """Return where the new bundle goes: nothing is replaced that was not named."""
    if in_place and out:
        raise click.UsageError("--out and --in-place exclude each other")
    if in_place:
        return bundle
    if out is not None:
        if out.resolve() == bundle.resolve():
            raise EdgeclipError(out, "is BUNDLE itself", "say --in-place to replace it")
        return out
    if bundle.name in ("", ".."):
        bundle = bundle.resolve()
    new = bundle.with_name(f"{bundle.name}-labels")
    if new.exists():
        raise EdgeclipError(new, "lies there already", "name a folder with --out, or --in-place")
    return new


@command()
@click.argument("images", nargs=-1, required=True, type=IMAGE)
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="A .npy file: float32 [n, D], unit rows in the order of IMAGES.",
)
@bundle_option
@json_option
def embed(images: tuple[Path, ...], out: Path, bundle: Path | None, as_json: bool) -> None:
    """Write the image features of IMAGES, for an index.

    Of several images those that cannot be read are skipped, named and counted: they have no row.
    --json names the image of each row.

    \b
    Example:
        edgeclip embed photos/*.jpg --out features.npy
    """
    if out.suffix != ".npy":
        raise EdgeclipError(out, "is not a .npy file", "give a name that ends in .npy")
    from edgeclip import disk
    from edgeclip.cli.over_images import embed_all

    disk.refuse_unwritable(out.parent)
    found = embed_all(images, bundle)
    disk.write_array(out, found.features)
    rows, width = found.features.shape
    record = {
        "out": str(out),
        "shape": [rows, width],
        "images": found.images,
        "skipped": found.skipped,
    }
    say(as_json, record, f"{out}: {rows} x {width}")

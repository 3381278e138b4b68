"""The commands that use one bundle: classify, labels, embed. They need no torch."""

import json
from pathlib import Path

import click

from edgeclip.cli import tables
from edgeclip.cli.options import json_option, label_file, say
from edgeclip.errors import EdgeclipError


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Bundle folder.  [default: one of runs/latest]",
)
@click.option(
    "--labels", help='Comma-separated, for example "a cat, a dog".  [default: the baked labels]'
)
@click.option("--top", default=5, show_default=True, help="How many labels to print.")
@json_option
def classify(
    images: tuple[Path, ...], bundle: Path | None, labels: str | None, top: int, as_json: bool
) -> None:
    """Rank labels for each of IMAGES.

    \b
    Example:
        edgeclip classify cat.jpg --labels "a cat, a dog, a car"
    """
    from edgeclip.device.bundle import Bundle
    from edgeclip.reports.store import one_bundle

    loaded = Bundle.load(one_bundle(bundle))
    words = [w.strip() for w in labels.split(",") if w.strip()] if labels is not None else None
    results = {str(image): loaded.classify(image, words, top) for image in images}
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    tables.ranking(results)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the new bundle.  [default: in place of BUNDLE]",
)
@json_option
def labels(bundle: Path, file: Path, out: Path | None, as_json: bool) -> None:
    """Bake the labels in FILE (one a line) into BUNDLE, without retraining.

    \b
    Example:
        edgeclip labels runs/latest/bundles/onnx-int8 fruit.txt --out fruit-bundle
    """
    from edgeclip.device.bundle import bake_labels

    words = label_file(file)
    path = bake_labels(bundle, words, out or bundle)
    say(as_json, {"bundle": str(path), "labels": words}, f"{path}: {len(words)} labels")


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A .npy file: float32 [n, D], unit rows in the order given.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Bundle folder.  [default: one of runs/latest]",
)
@json_option
def embed(images: tuple[Path, ...], out: Path, bundle: Path | None, as_json: bool) -> None:
    """Write the image features of IMAGES, for an index.

    \b
    Example:
        edgeclip embed photos/*.jpg --out features.npy
    """
    if out.suffix != ".npy":
        raise EdgeclipError(out, "is not a .npy file", "give a name that ends in .npy")
    from edgeclip import disk
    from edgeclip.device.bundle import Bundle
    from edgeclip.reports.store import one_bundle

    features = Bundle.load(one_bundle(bundle)).encode_image(list(images))
    disk.write_array(out, features)
    say(
        as_json,
        {"out": str(out), "shape": list(features.shape)},
        f"{out}: {features.shape[0]} x {features.shape[1]}",
    )

"""The commands that use one bundle: classify, labels, embed. They need no torch."""

from pathlib import Path

import click

from edgeclip.cli import complete
from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, bundle_option, json_option, label_file, print_json, say
from edgeclip.cli.tables.bundles import ranking
from edgeclip.errors import EdgeclipError


@command()
@click.argument("images", nargs=-1, required=True, type=PATH)
@bundle_option
@click.option(
    "--labels",
    help='Comma-separated, for example "a cat, a dog".  [default: the baked labels]',
    shell_complete=complete.labels,
)
@click.option("--top", default=5, show_default=True, help="How many labels to print per image.")
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

    \b
    Example:
        edgeclip classify cat.jpg --labels "a cat, a dog, a car"
    """
    from edgeclip.device.bundle import Bundle
    from edgeclip.reports.store import one_bundle

    loaded = Bundle.load(one_bundle(bundle))
    _say_turned(images, loaded.preprocess.exif)
    words = _words(labels)
    results = {}
    for image in images:
        results[str(image)] = loaded.classify(image, words, top, offset=not no_offset)
    if as_json:
        print_json(results)
    else:
        ranking(results)


def _say_turned(images: tuple[Path, ...], exif: bool) -> None:
    from edgeclip.device.images import ImageRef
    from edgeclip.device.turned import say_turned

    say_turned([[ImageRef(str(path), str(path)) for path in images]], exif)


def _words(labels: str | None) -> list[str] | None:
    """Return the labels between the commas; None: none were given."""
    if labels is None:
        return None
    words = [word.strip() for word in labels.split(",")]
    return [word for word in words if word]


@command()
@click.argument("bundle", type=PATH)
@click.argument("file", type=PATH)
@click.option("--out", type=PATH, help="Folder of the new bundle.  [default: replace BUNDLE]")
@click.option("--no-offset", is_flag=True, help="Leave the class offset out of the new bundle.")
@json_option
def labels(bundle: Path, file: Path, out: Path | None, no_offset: bool, as_json: bool) -> None:
    """Give BUNDLE the labels in FILE (one per line); no retraining.

    A label that had labels in training keeps its class offset; a new one has none.

    \b
    Example:
        edgeclip labels runs/latest/bundles/onnx-int8 fruit.txt --out fruit-bundle
    """
    from edgeclip.device.bundle import Bundle, bake_labels

    words = label_file(file)
    path = bake_labels(bundle, words, out or bundle, offset=not no_offset)
    known = Bundle.load(path).manifest.class_offset
    keep: list[str] = []
    if known is not None:
        keep = sorted(set(known.labels) & set(words))
    line = f"{path}: {len(words)} labels"
    if known is not None:
        line += f", {len(keep)} of which keep the class offset {known.offset:+.4f}"
    say(as_json, {"bundle": str(path), "labels": words, "with_class_offset": keep}, line)


@command()
@click.argument("images", nargs=-1, required=True, type=PATH)
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

    \b
    Example:
        edgeclip embed photos/*.jpg --out features.npy
    """
    if out.suffix != ".npy":
        raise EdgeclipError(out, "is not a .npy file", "give a name that ends in .npy")
    from edgeclip import disk
    from edgeclip.device.bundle import Bundle
    from edgeclip.reports.store import one_bundle

    loaded = Bundle.load(one_bundle(bundle))
    _say_turned(images, loaded.preprocess.exif)
    features = loaded.encode_image(list(images))
    disk.write_array(out, features)
    rows, width = features.shape
    say(as_json, {"out": str(out), "shape": [rows, width]}, f"{out}: {rows} x {width}")

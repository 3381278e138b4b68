"""YAML into frozen typed structs, strictly.

A YAML file is the complete description of a thing: no inheritance, no interpolation, no overrides.
Unknown keys are errors with a did-you-mean, wrong types are errors with the path of the field.
msgspec does the converting.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeclip import text_file
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.text_file.parser import MAX_YAML, parse_yaml, refuse_infinite

T = TypeVar("T")
LISTS = (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)
FOLDERS = {"recipe": "recipes", "target": "export", "device": "devices"}
RENAMED = {
    "bundle_r1": "bundle_top1",
    "centre_texts": "center_texts",
    "centred_cosine_mean": "centered_cosine_mean",
    "centred_cosine_p1": "centered_cosine_p1",
    "centred_min": "centered_min",
    "centred_p1": "centered_p1",
    "centred_p5": "centered_p5",
    "learnt": "learned",
    "licence": "license",
    "licences": "licenses",
    "max_pictures": "max_images",
    "normalise": "normalize",
    "optimisation": "optimization",
    "optimisation_agreement": "optimization_agreement",
    "pictures": "images",
    "pictures_per_second": "images_per_second",
    "quantisation": "quantization",
    "recognise": "recognize",
    "reference_r1": "reference_top1",
    "unlabelled": "unlabeled",
}
"""field of a YAML or JSON file of edgeclip 0.1, to what it is called now"""
MOVED = {
    "distill": "qat: {target: NAME}",
    "train.first": "train.pretrain",
}
"""the same for fields that are elsewhere now, by their whole path"""
REMOVED = ("memory_bandwidth_gb_s",)
"""fields of edgeclip 0.1 that nothing reads any more"""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every description is: immutable, and closed to fields that it does not know."""


class BrokenRule(ValueError):
    """A combination of fields that cannot work, raised by a struct's `__post_init__`.

    `convert` makes of it the one line that a user sees, with the path of the struct before the
    field.
    """

    def __init__(self, field: str, what: str, do: str):
        super().__init__(what)
        self.field = field
        self.what = what
        self.do = do


def load(path: Path, type_: type[T]) -> T:
    """Return the YAML file at `path` as a struct of that type.

    Raises `EdgeclipError` for a missing file, broken YAML, an unknown field, a wrong type, and a
    rule that is broken.
    """
    return convert(parse_yaml(text_file.read(path, MAX_YAML), path), type_, path)


def convert(value: Any, type_: type[T], where: object) -> T:
    """Return parsed YAML or JSON as a struct of that type. Raises as `load`, naming `where`."""
    if not isinstance(value, dict):
        raise EdgeclipError(
            where, "is not a mapping of fields", "see the files that `edgeclip list` names"
        )
    _refuse_unknown(value, msgspec.inspect.type_info(type_), where, "")
    refuse_infinite(value, where)
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as e:
        raise _as_mistake(e, where) from None


def _as_mistake(error: msgspec.ValidationError, where: object) -> EdgeclipError:
    """Return a wrong type or a broken rule as a user's mistake, at the path of its field."""
    what, _, at = str(error).partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    rule = error.__cause__
    if isinstance(rule, BrokenRule):
        field = f"{path}.{rule.field}".strip(".")
        return EdgeclipError(f"{where}: {field}", rule.what, rule.do)
    return EdgeclipError(
        f"{where}: {path or 'the file'}", what[0].lower() + what[1:], "correct the field"
    )


def _refuse_unknown(value: Any, info: Any, where: object, at: str) -> None:
    """Raise `EdgeclipError` for a field or a word that the type does not have, at any depth."""
    if isinstance(info, msgspec.inspect.UnionType):
        for struct in _meant(value, info, where, at):
            _refuse_unknown(value, struct, where, at)
    elif isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        fields = {f.encode_name: f.type for f in info.fields}
        for key, item in value.items():
            if key in fields:
                _refuse_unknown(item, fields[key], where, f"{at}{key}.")
            elif key != info.tag_field:
                raise _unknown_field(f"{at}{key}", str(key), fields, where)
    elif isinstance(info, LISTS) and isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_unknown(item, info.item_type, where, f"{at}{i}.")
    elif isinstance(info, msgspec.inspect.LiteralType) and isinstance(value, str):
        known = [str(v) for v in info.values]
        if value not in known:
            what = f"unknown value '{value}'"
            raise EdgeclipError(f"{where}: {at.rstrip('.')}", what, did_you_mean(value, known))


def _meant(value: Any, info: Any, where: object, at: str) -> list[Any]:
    """Return the structs of a union that `value` may be; of several, tagged by `kind`, the one."""
    structs = [t for t in info.types if isinstance(t, msgspec.inspect.StructType)]
    if not isinstance(value, dict) or len(structs) < 2:
        return structs
    kinds = {}
    for struct in structs:
        kinds[str(struct.tag)] = struct
    kind = str(value.get("kind"))
    if kind not in kinds:
        raise EdgeclipError(
            f"{where}: {at}kind", f"unknown kind '{kind}'", did_you_mean(kind, kinds)
        )
    return [kinds[kind]]


def _unknown_field(path: str, key: str, known: Iterable[str], where: object) -> EdgeclipError:
    """Return the error for a field that is not known: an old name is told the new one."""
    if key in REMOVED:
        return EdgeclipError(f"{where}: {path}", "is not used any more", "remove it")
    new = MOVED.get(path) or RENAMED.get(key)
    if new is not None:
        return EdgeclipError(f"{where}: {path}", f"was renamed to `{new}`", "rename it")
    return EdgeclipError(f"{where}: {path}", "unknown field", did_you_mean(key, known))


def renamed(value: Any) -> Any:
    """Return JSON of edgeclip 0.1 with every field in today's words, at any depth."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): renamed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item) for item in value]
    return value


def shipped(kind: str) -> dict[str, Path]:
    """Return name to path of every YAML of a kind ('recipe', 'target' or 'device') within reach.

    Looked for in the working folder, then in the checkout or wheel that edgeclip runs from.
    """
    package = Path(__file__).parent
    name = FOLDERS[kind]
    found: dict[str, Path] = {}
    for folder in (package / "yaml" / name, package.parent / name, Path(name)):
        for path in sorted(folder.glob("*.yaml")):
            found[path.stem] = path
    return found


def find(kind: str, name: str) -> Path:
    """Return the path of a YAML: a path as it is, a bare name among the shipped ones.

    What ends in .yaml or names a folder on its way is a path. Raises `EdgeclipError` with a
    did-you-mean for an unknown name.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    known = shipped(kind)
    if name not in known:
        raise EdgeclipError(name, f"unknown {kind}", did_you_mean(name, known))
    return known[name]

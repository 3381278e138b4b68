"""Read the results of edgeclip 0.1, which have no `format`, in today's words."""

from collections.abc import Iterable

from edgeclip.disk import Json

RENAMED = {
    "pictures": "images",
    "chance_r1": "own_list_chance_top1",
    "data_licence": "data_license",
    "harmonic_mean": "own_list_harmonic_mean",
    "average": "own_list_average",
}
"""fields of edgeclip 0.1"""
RENAMED_LAPS = {"waiting for pictures": "waiting for images", "optimiser": "optimizer"}


def of_first_format(value: Json, models: Iterable[str]) -> Json:
    """Return today's form of a record of edgeclip 0.1, which has other names for a few fields."""
    new = _renamed(value, RENAMED)
    retrieval = value.get("protocol") == "retrieval"
    if value.get("protocol") == "domain_generalisation":
        new["protocol"] = "domain_generalization"
    if "seconds" in value:
        new["seconds"] = _renamed(value["seconds"], RENAMED_LAPS)
    if "log" in value:
        new["log"] = [_log_row(row) for row in value["log"]]
    new["sets"] = []
    for row in value.get("sets", []):
        new["sets"].append(_set(row, retrieval, models))
    return new


def _set(row: Json, retrieval: bool, models: Iterable[str]) -> Json:
    if retrieval:
        return _renamed(row, {"pictures": "images"})
    new = {**_renamed(row, RENAMED), "labels": None, "chance_top1": None}
    for model in models:
        if new.get(model):
            within = _renamed(new[model], {"r1": "own_list_top1", "r5": "own_list_top5"})
            new[model] = {**within, "top1": None, "top5": None}
    return new


def _log_row(row: Json) -> Json:
    # Pea-KD's first training was called `first` in the recipe.
    names = {"first_features": "pretrain_features", "first_predictions": "pretrain_predictions"}
    return _renamed(row, names)


def _renamed(value: Json, names: dict[str, str]) -> Json:
    return {names.get(name, name): item for name, item in value.items()}

"""What a refactoring must not change: the same numbers before and after it, to the last bit.

Write in the tree before, compare in the tree after, on one machine with the same libraries; with
neither, a tree is compared with itself. --compare ends with 1 where an entry differs. It runs on
the flat layout of 0.1 too, copied there.

    curves        every loss of each method's golden 20-step curve, and the weights behind it
    resumed       the weights of toy runs that went through, and of the same ones stopped half-way and gone on with
    graphs        both encoders' files in every target, of a depthwise network and a ViT with seeded weights. What quantizes
                  is given one candidate, so that neither search nor time has a say: `first` is the
                  target's first range method with 8-bit weights; `last` its last one, with 7-bit
                  weights, smoothing (ViT) and float depthwise layers (the other) where it has those
    quickstart    of `edgeclip distill recipes/quickstart.yaml`: every tensor of the run, and every number of results.json
                  but times and memory (10 to 20 minutes; --quick leaves it out)

Weights and files are compared by sha256, metadata and names included; one thread makes that sums
have one order.

    python benchmarks/unchanged.py --write before.json
    python benchmarks/unchanged.py --compare before.json        # --rename OLD=NEW: a part of names, between slashes
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
OLD = not (REPO / "edgeclip" / "host").is_dir()  # the flat layout of 0.1
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
sys.path[:0] = [str(REPO), str(REPO / "tests")]
common: Any = None if OLD else import_module("common")
MODULES = {  # where the parts find what they need, today and in 0.1
    "curves": ("tests.host.distill.test_train", "test_train"),
    "resume": ("tests.host.distill.test_checkpoint", "test_resume"),
    "export": ("edgeclip.host.export", "edgeclip.export"),
    "source": ("edgeclip.host.export.source", "edgeclip.export.source"),
    "target": ("edgeclip.device.target", "edgeclip.target"),
}
IMAGES, COSINE = [("images", "centered_cosine_p1"), ("pictures", "centred_cosine_p1")][OLD]
STUDENTS = {
    "depthwise": {"timm_model_name": "test_efficientnet", "timm_pool": "", "timm_proj": "linear"},
    "vit": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
}
"""image towers of open_clip models"""
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CURVES = {"smoke": 3}
NOT_FIGURES = {"seconds", "peak_memory_mib", "format"}
Entries = Iterator[tuple[str, str]]


def module(name: str) -> Any:
    return import_module(MODULES[name][OLD])


def of_tensors(tensors: dict[str, Any]) -> str:
    """Return one sha256 of the names, shapes, types and bits of tensors."""
    content = b""
    for name in sorted(tensors):
        array = tensors[name].detach().numpy()
        content += f"{name} {array.dtype} {array.shape}".encode() + array.tobytes()
    return sha256(content).hexdigest()


def curves(folder: Path, options: argparse.Namespace) -> Entries:
    tests = module("curves")
    for method in list(tests.METHODS)[: CURVES.get(options.form)]:
        with pytest.MonkeyPatch.context() as patch:
            steps, weights, _ = tests.curve(tests.METHODS[method], patch)
        yield f"{method}/losses", " ".join(map(repr, steps))
        yield f"{method}/weights", of_tensors(weights)


def resumed(folder: Path, options: argparse.Namespace) -> Entries:
    tests = module("resume")
    for name, case in tests.CASES.items():
        toy = partial(tests.run, folder, **case)
        steps, weights, _ = toy()
        again = partial(toy, checkpoints=folder / f"checkpoint of {name}")
        _stop_after(len(steps) // 2, tests, again)
        rest, same, _ = again()
        if of_tensors(same) != of_tensors(weights) or len(rest) == len(steps):
            sys.exit(f"{name}: a run that was stopped and went on is not the one that was not")
        yield f"{name}/losses", " ".join(map(repr, steps))
        yield f"{name}/went through", of_tensors(weights)
        yield f"{name}/stopped and went on", of_tensors(same)


def _stop_after(count: int, tests: Any, run: Any) -> None:
    call, done = tests.Step.__call__, []

    def stopping(self: Any, *arguments: Any) -> Any:
        done.append(call(self, *arguments))
        if len(done) == count:
            signal.raise_signal(signal.SIGTERM)
        return done[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(tests.Interrupted):
        patch.setattr(tests.Step, "__call__", stopping)
        run()


def graphs(folder: Path, options: argparse.Namespace) -> Entries:
    for student in STUDENTS:
        source = _source(student, folder)
        for name in sorted(path.stem for path in (REPO / "export").glob("*.yaml")):
            for form, target in _forms(student, name):
                out = folder / student / name / form
                module("export").export(source, name, target, out)
                for path in sorted(out.glob("*_encoder*")):
                    content = sha256(path.read_bytes()).hexdigest()
                    yield f"{student}/{name}/{form}/{path.name}", content


def _source(student: str, folder: Path) -> Any:
    """Return an open_clip model of seeded weights; it and 32 images are written to `folder`."""
    import numpy as np
    import torch
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(32):
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        noise.resize((72, 72)).save(folder / f"{i:02d}.png")
    vision = {"image_size": 64, **STUDENTS[student]}
    config = folder / f"{student}.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    torch.manual_seed(0)
    source = module("source").from_model(str(config), "random", [], folder)
    text = source.load_text()
    for tensor in [*source.image_encoder.parameters(), *source.image_encoder.buffers()]:
        if tensor.is_floating_point():  # equal ones, such as new norms have, a tracer makes one
            tensor.data += 0.05 * torch.rand_like(tensor)
    return source._replace(load_text=lambda: text)


def _forms(student: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a float target as it is, any other with each of two candidates alone and no gate."""
    from msgspec.structs import replace

    target = module("target").load(name)[1]
    if target.calibration is None:
        yield "plain", target
        return
    target = replace(target, tolerance=replace(target.tolerance, **{COSINE: -1.0}))
    gates = {"probe_layers": 0, "min_int8_share": 0.0, "min_speedup": 0.0}
    spec = replace(target.calibration, judged_on=8, **gates, **{IMAGES: 24})
    own = {"vit": "smoothing", "depthwise": "layers"}[student]
    for form, at in (("first", 0), ("last", -1)):
        candidate = {"smoothing": spec.smoothing[:1], "layers": spec.layers[:1]}
        for field in ("methods", "model_types", own):
            candidate[field] = (getattr(spec, field)[at],)
        pinned = replace(target, calibration=replace(spec, **candidate))
        if target.reduce_range:
            pinned = replace(pinned, reduce_range=("never", "always")[at])
        yield form, pinned


def quickstart(folder: Path, options: argparse.Namespace) -> Entries:
    from safetensors.torch import load_file

    place = options.folder or folder
    command = [sys.executable, "-m", "edgeclip", "distill", str(REPO / "recipes/quickstart.yaml")]
    subprocess.run(command, cwd=place, check=True, stdout=sys.stderr)
    run = place / "runs" / "quickstart"
    for path in sorted(run.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            yield f"{path.relative_to(run)}/{name}", of_tensors({name: tensor})
    for path in sorted(run.rglob("*.npy")):
        yield str(path.relative_to(run)), sha256(path.read_bytes()).hexdigest()
    yield from _numbers("results", json.loads((run / "results.json").read_text()))


def _numbers(name: str, value: Any) -> Entries:
    """Yield every number in a JSON value, to its last digit."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key in value.keys() - NOT_FIGURES:
            yield from _numbers(f"{name}/{key}", value[key])
    elif isinstance(value, int | float):
        yield name, repr(value)


PARTS = {"curves": curves, "resumed": resumed, "graphs": graphs, "quickstart": quickstart}
PARTS_OF = {"whole": list(PARTS), "quick": list(PARTS)[:-1], "smoke": ["curves"]}


def record(options: argparse.Namespace) -> dict[str, str]:
    entries = {}
    for part in options.only:
        with tempfile.TemporaryDirectory(prefix="edgeclip-unchanged-") as temporary:
            for name, value in PARTS[part](Path(temporary), options):
                entries[f"{part}/{name}"] = value
    return entries


def differing(file: Path, after: dict[str, str], options: argparse.Namespace) -> list[str]:
    """Print each entry that differs from the file's, and how many are equal; return the former."""
    new = dict(pair.split("=") for pair in options.rename)
    before = {}
    for name, value in json.loads(file.read_text()).items():
        words = name.split("/")
        if words[0] in options.only:
            before["/".join(new.get(word, word) for word in words)] = value
    names = [name for name in before | after if before.get(name) != after.get(name)]
    for name in names:
        print(f"{name}: was {before.get(name)}, is {after.get(name)}")
    print(f"{len(before | after) - len(names)} entries equal, {len(names)} different")
    return names


def main() -> None:
    parser = argparse.ArgumentParser() if OLD else common.arguments(__doc__)
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--write", type=Path, metavar="FILE", help="record this tree there")
    file.add_argument("--compare", type=Path, metavar="FILE", help="compare this tree with it")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW")
    parser.add_argument("--folder", type=Path, help="where quickstart leaves its run")
    options = parser.parse_args(namespace=argparse.Namespace(form="whole"))
    options.only = options.only or PARTS_OF[options.form]
    here = common and common.this_machine()
    names = []
    with tempfile.TemporaryDirectory() as temporary:
        path = options.write or options.compare or Path(temporary) / "itself.json"
        if not options.compare:
            entries = record(options)
            path.write_text(json.dumps(entries, indent=1))
            print(f"{len(entries)} entries recorded: {', '.join(options.only)}")
        if not options.write:
            entries = record(options)
            names = differing(path, entries, options)
    if common:
        figures = {"benchmark": "unchanged", "entries": len(entries), "different": names}
        common.finish(figures, [], here, options)
    sys.exit(bool(names))


if __name__ == "__main__":
    main()

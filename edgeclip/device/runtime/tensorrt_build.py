"""Builds a TensorRT engine from a bundle's ONNX file, on the board that will run it, and reads back
what it became.

An engine belongs to its GPU and TensorRT version, so it never ships: this file does, as
`build_engine.py` in every TensorRT bundle. It needs Python and TensorRT alone. The code is written
over the module, `tensorrt` on a board or `tensorrt_rtx` where there is no GPU, which parses and
builds and so says what is legal, but cannot run.

    python3 build_engine.py [--workspace-mib 1024] [--batch 1 4 8]

The graph is strongly typed: precisions are the ONNX file's, no flag changes them. What the builder
made of them is read from the engine: an engine without a layer that takes int8 (fp8) is not called
one.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

TYPES = {
    "int8": ("int8",),
    "fp8": ("fp8", "e4m3"),
    "fp16": ("fp16", "half"),
    "fp32": ("fp32", "float"),
}
PRODUCTS = ("conv", "gemm", "matmul", "matrix", "fully")


MOVES = ("reformat", "quantize", "cast", "shuffle")
"""kinds that change how a tensor lies or is written: what they take says nothing of what is
computed"""


class Built(TypedDict):
    """What is known of an engine that was built."""

    engine_bytes: int
    seconds: float
    """that the build took"""
    module: str
    """tensorrt or tensorrt_rtx"""
    version: str
    """of the module"""
    batch: list[int]
    """smallest, best and largest"""
    workspace_mib: int
    timing_cache: bool
    """whether the build took and gave one"""
    layers: list[dict[str, str]] | None
    """`layers` of the engine"""


class BuildError(Exception):
    """One line: where, what, what to do."""


def module(names: tuple[str, ...] = ("tensorrt", "tensorrt_rtx")) -> Any:
    """Return the first of these modules that is installed; raise `BuildError` where none is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    do = "it comes with JetPack, on another machine: pip install 'edgeclip[lint]'"
    raise BuildError(f"{' / '.join(names)}: not installed; {do}")


def parse(trt: Any, path: Path, logger: Any) -> tuple[Any, Any, list[dict[str, str]]]:
    """Return builder, network and errors, each {"node", "operator", "what"}."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parser.parse(path.read_bytes())
    errors = []
    for i in range(parser.num_errors):
        e = parser.get_error(i)
        errors.append(
            {
                "node": str(e.node_name() or ""),
                "operator": str(e.node_operator() or ""),
                "what": " ".join(str(e.desc()).split())[:300],
            }
        )
    return builder, network, errors


def build(
    path: Path,
    out: Path | None = None,
    batch: tuple[int, int, int] = (1, 4, 8),
    workspace_mib: int = 1024,
    timing_cache: Path | None = None,
    trt: Any = None,
) -> Built:
    """Build the engine of an ONNX file, write it to `out` (None: nowhere), and return its facts.

    batch: the profile's minimum, optimum and maximum of every input's first axis. timing_cache:
    read if it is there, written after. "layers" is None where no engine can be opened, that is
    without a GPU. Raises `BuildError`.
    """
    trt = trt or module()
    logger = trt.Logger(trt.Logger.ERROR)
    builder, network, errors = parse(trt, path, logger)
    if errors:
        first = errors[0]
        node = f"node '{first['node']}' ({first['operator']})"
        raise BuildError(f"{path.name}: {node}: {first['what']}; edgeclip lint names the cure")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((b, *rest) for b in batch))
    config.add_optimization_profile(profile)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cached = _timing(trt, config, timing_cache)
    before = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        what = f"{trt.__name__} {trt.__version__} parses it and does not build it"
        do = "look at its log, or lower --batch or --workspace-mib"
        raise BuildError(f"{path.name}: {what}; {do}")
    seconds = round(time.perf_counter() - before, 2)
    plan = bytes(plan)
    if timing_cache is not None and cached:
        _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    if out is not None:
        _write(out, plan)
    return {
        "engine_bytes": len(plan),
        "seconds": seconds,
        "module": trt.__name__,
        "version": trt.__version__,
        "batch": list(batch),
        "workspace_mib": workspace_mib,
        "timing_cache": cached,
        "layers": layers(trt, plan, logger),
    }


def _timing(trt: Any, config: Any, path: Path | None) -> bool:
    """Return whether the build takes and gives a timing cache; TensorRT-RTX has none."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return False
    kept = b""
    if path.exists():
        kept = path.read_bytes()
    cache = config.create_timing_cache(kept)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def layers(trt: Any, plan: bytes, logger: Any) -> list[dict[str, str]] | None:
    """Name, kind and input precision of each layer of a built engine; None where it cannot be
    opened (no GPU)."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    except Exception:  # without a driver the runtime itself cannot be made
        return None
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return read_layers(json.loads(text))


def read_layers(information: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the same from an engine inspector's JSON."""
    found = []
    for layer in information.get("Layers", []):
        if isinstance(layer, str):  # verbosity was not DETAILED when it was built
            found.append({"name": layer, "kind": "unknown", "precision": "unknown"})
            continue
        types = [str(i.get("Format/Datatype", "")) for i in layer.get("Inputs", [])]
        found.append(
            {
                "name": str(layer.get("Name", "")),
                "kind": str(layer.get("LayerType", "")),
                "precision": _precision(" ".join(types).lower()),
            }
        )
    return found


def _precision(types: str) -> str:
    """Return the precision that an inspector's words for input types name first."""
    for name, words in TYPES.items():
        if any(word in types for word in words):
            return name
    return "unknown"


def counts(found: list[dict[str, str]]) -> dict[str, int]:
    """How many of the layers that compute something take each precision."""
    count: dict[str, int] = {}
    for layer in found:
        if not any(m in layer["kind"].lower() for m in MOVES):
            count[layer["precision"]] = count.get(layer["precision"], 0) + 1
    return count


def _is_product(kind: str) -> bool:
    return any(word in kind.lower() for word in PRODUCTS)


def require(precision: str, found: list[dict[str, str]]) -> dict[str, int]:
    """Return `counts`; raise `BuildError` where no layer takes the engine's precision."""
    count = counts(found)
    if not count.get(precision):
        products = [f"{x['name']} in {x['precision']}" for x in found if _is_product(x["kind"])]
        what = ", ".join(products[:3]) or "no product is visible"
        do = f"do not call it {precision}: this GPU or TensorRT version may not have it"
        raise BuildError(f"engine: no layer takes {precision} ({what}); {do}")
    return count


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def main() -> None:
    """Build the engines of the bundle that this file lies in."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build this bundle's engines for this board.")
    parser.add_argument("--workspace-mib", type=int, default=1024)
    parser.add_argument(
        "--batch", type=int, nargs=3, default=(1, 4, 8), metavar=("MIN", "OPT", "MAX")
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=here.parent / "engines",
        help="folder of the engines and the timing cache",
    )
    options = parser.parse_args()
    try:
        trt = module(("tensorrt",))
        manifest = json.loads((here / "manifest.json").read_text())
        target = manifest["target"]
        options.out.mkdir(parents=True, exist_ok=True)
        _build_one(trt, here / manifest["image_encoder"], target["precision"], options)
        if manifest["text"]:
            _build_one(trt, here / manifest["text"]["encoder"], target["text"], options)
    except BuildError as e:
        sys.exit(f"Error: {e}")


def _build_one(trt: Any, model: Path, precision: str, options: argparse.Namespace) -> None:
    """Build one engine and print its layers; an engine without its precision is removed."""
    out = options.out / f"{model.stem}.plan"
    cache = options.out / "timing.cache"
    facts = build(model, out, tuple(options.batch), options.workspace_mib, cache, trt)
    if facts["layers"] is None:
        what = "the engine was built and cannot be opened here"
        raise BuildError(f"{out.name}: {what}; is there a GPU and its driver?")
    for layer in facts["layers"]:
        print(f"{layer['precision']:<8} {layer['kind']:<24} {layer['name']}")
    try:
        taken = require(precision, facts["layers"])
    except BuildError:
        out.unlink()
        raise
    print(f"{out}: {taken}, {facts['engine_bytes'] / 2**20:.1f} MiB in {facts['seconds']} s")


if __name__ == "__main__":
    main()

"""A bundle's manifest as `edgeclip export` writes it, for tests that need no graph."""

from typing import Any


def manifest_fields(name: str = "t", **changes: Any) -> dict[str, Any]:
    """Return what `disk.write_manifest(folder, "bundle", ...)` takes: a float32 ONNX bundle."""
    fields = {
        "format": 2,
        "target": {
            "name": name,
            "runtime": "onnxruntime",
            "precision": "fp32",
            "tolerance": {
                "centered_cosine_p1": 0.9999,
                "top1_agreement": 0.99,
                "accuracy_drop_pp": 0.1,
            },
        },
        "runtime": "onnxruntime",
        "image_encoder": "image_encoder.onnx",
        "image_encoder_bytes": 3 << 20,
        "preprocess": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "logit_scale": 20.0,
        "embed_dim": 16,
        "templates": [],
        "text": None,
        "golden": {"images": [], "license": None},
        "licenses": {"data": "CC0"},
        "parents": {},
        "calibration": [],
        "quantization": None,
        "lint": None,
        "versions": {"edgeclip": "0.2.0"},
    }
    return fields | changes


def search_record(**changes: Any) -> dict[str, Any]:
    """Return how the image encoder was quantized: one candidate, which was chosen."""
    fields = {
        "method": "minmax",
        "smoothing": None,
        "layers": "all",
        "model_type": None,
        "reduce_range": False,
        "float_layers": {},
        "int8_layers": 12,
        "int8_nodes": [],
        "int8_share_of_macs": 0.9,
        "judged_on": 9,
        "judged_in": "onnxruntime",
        "latency_ms_float": 5.0,
        "learned": False,
        "frontier": [candidate_row()],
    }
    return fields | changes


def candidate_row(**changes: Any) -> dict[str, Any]:
    """Return one int8 candidate of the search, which was chosen."""
    fields = {
        "method": "minmax",
        "smoothing": None,
        "layers": "all",
        "model_type": None,
        "float_layers": 3,
        "int8_share_of_macs": 0.9,
        "centered_cosine_mean": 0.995,
        "centered_cosine_p1": 0.99,
        "top1_agreement": None,
        "agreement_where_right": None,
        "bytes": 1 << 20,
        "latency_ms": 2.0,
        "verdict": "chosen",
    }
    return fields | changes

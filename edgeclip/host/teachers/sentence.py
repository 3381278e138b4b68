"""Rebuild all-MiniLM-L6-v2, the sentence encoder that pip brings, as one exportable module.

BERT's six post-norm layers are torch's own `TransformerEncoder`, so the checkpoint's tensors are
only renamed. Padding is masked with a finite -1e4, not -inf: it must survive fp16 and int8.
"""

import io
import zipfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 384
HEADS = 12
LAYERS = 6
VOCABULARY = 30522
POSITIONS = 512
CONTEXT_LENGTH = 64


class SentenceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(POSITIONS, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            4 * WIDTH,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, input_ids: Int[Tensor, "N L"]) -> Float[Tensor, "N 384"]:
        mask = (input_ids != 0).float()
        x = self.norm(self.word(input_ids) + self.position[: input_ids.shape[1]])
        x = self.encoder(x, src_key_padding_mask=(1.0 - mask) * -1e4)
        x = (x * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(x, dim=-1)


def load(archive: Path) -> tuple[SentenceEncoder, str]:
    """Return the encoder with its weights, and its tokenizer.json, from the package's zip."""
    with zipfile.ZipFile(archive) as z:
        bert = load_safetensors(io.BytesIO(z.read("model.safetensors")).getvalue())
        tokenizer = z.read("tokenizer.json").decode()
    model = SentenceEncoder()
    # The sum of word and token-type embeddings is one table: the type is always 0.
    state = {
        "word.weight": bert["embeddings.word_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0],
        "position": bert["embeddings.position_embeddings.weight"],
        "norm.weight": bert["embeddings.LayerNorm.weight"],
        "norm.bias": bert["embeddings.LayerNorm.bias"],
    }
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i in range(LAYERS):
        ours = f"encoder.layers.{i}"
        theirs = f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            qkv = [bert[f"{theirs}.attention.self.{k}.{part}"] for k in ("query", "key", "value")]
            state[f"{ours}.self_attn.in_proj_{part}"] = torch.cat(qkv)
            for name, in_bert in names.items():
                state[f"{ours}.{name}.{part}"] = bert[f"{theirs}.{in_bert}.{part}"]
    model.load_state_dict(state)
    return model.eval(), tokenizer

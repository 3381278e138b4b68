"""Strings of all kinds that a person or a program may hand to a tokenizer."""

import random
import unicodedata
from collections.abc import Iterator

PIECES = """dog cat a photo of the Größe naïve fenêtre œuf señal coração żółw собака ΣΚΥΛΟΣ كلب
 कुत्ता 自行车 ソファー 강아지 đường İstanbul &amp; &lt; &#39; &eacute; &EACUTE; &amp;amp; 's 'T ’s “ ” ﬁ … Â© Ã©
 â€™ e\u0301 I\u0307 K ½ ² ① Ⅷ 'ſ 👩‍👩‍👧 🇫🇷 ♥ 1,234 3/4 $5 _x_ C++ <b> [SEP] </s> <unk> ## ▁ Ĺľ Рі""".split()
BLANKS = [
    " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u200b", "\u2028", "\u3000", "\ufeff", "\x1b[31m", "\x00"
]  # fmt: skip
LABELS = """chien, fenêtre, cœur, œuf à la coque, l'arc-en-ciel, créée, brosse à dents, Noël, Élan, ÉTÉ
Hündin, Größe, Straßenbahn, ÜBERGRÖSSE, Äpfel und Öl
niño, señal de tráfico, ¿qué?, pingüino, corazón
maçã, coração, pão de açúcar, avião, São Paulo, ÔNIBUS, Ícone
żółw, źrebię, książka, łódź, ŁÓDŹ
собака, кошка, Москва, ёлка, Рівне, Ђорђе
σκύλος, ΣΚΥΛΟΣ, γάτα, Άγιος
كلب, قطة, سيارة إسعاف
כלב, חתול
कुत्ता, बिल्ली, हाथी
狗, 猫, 自行车, 「犬」
いぬ, ネコ, 自転車, ソファー
강아지, 고양이
con chó, đường phố, Việt Nam, xe đạp
köpek, kedi, ağaç, İstanbul, ışık, ÇİÇEK
pes, kočka, žába, ŽLUŤOUČKÝ KŮŇ, řeřicha
æble, smørrebrød, Ærø, BLÅBÆR, ål
สุนัข, แมว"""
"""real labels, a line a language"""


def labels() -> list[str]:
    return LABELS.replace("\n", ", ").split(", ")


def assigned(below: int = 0x110000) -> list[str]:
    """Every character that this Python knows, but surrogates and private ones."""
    return [
        chr(c) for c in range(1, below) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")
    ]


def mixed(count: int, seed: int = 0) -> Iterator[str]:
    """Strings of one to nine pieces: words, signs, entities, broken text, characters of any script."""
    rng = random.Random(seed)
    every, near = assigned(), assigned(0x3000)
    for _ in range(count):
        pool = rng.choice([PIECES, PIECES, every, near, labels()])
        parts = []
        for _ in range(rng.randint(1, 9)):
            source = pool if rng.random() < 0.8 else PIECES
            parts.append(rng.choice(source) + rng.choice([*BLANKS, *["", " "] * 12]))
        yield "".join(parts)

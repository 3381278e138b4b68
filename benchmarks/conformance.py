"""What users bring, beside the libraries that it was made with: texts, images, checkpoints.

Required is that nothing differs: every string has the ids, every image the pixels and every
checkpoint the features (to 1e-5) that open_clip, transformers, torchvision and timm give.

    texts        conform_texts.py: tokenizers of every family, 100,000 strings each, all of Unicode
    images       conform_images.py: 40 files of all modes, 2,000 with bytes changed or cut off
    checkpoints  conform_weights.py: every layout that is read, with each model it can be of

    python benchmarks/conformance.py --check
    python benchmarks/conformance.py --only texts
"""

import common
import conform_images
import conform_texts
import conform_weights

PARTS = {
    "texts": conform_texts.rows,
    "images": lambda form: conform_images.rows(form != common.WHOLE),
    "checkpoints": lambda form: conform_weights.rows(form != common.WHOLE),
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    here = common.this_machine()
    required = []
    for part in options.only:
        required += PARTS[part](options.form)
    common.finish({"benchmark": "conformance", "parts": options.only}, required, here, options)


if __name__ == "__main__":
    main()

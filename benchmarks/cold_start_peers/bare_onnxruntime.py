"""One image, ten baked labels, and nothing else: the least that a Python process with ONNX Runtime
can do.

python bare_onnxruntime.py MODEL.onnx CLASS_FEATURES.npy LABELS.json IMAGE

The model file is trusted, not hashed; preprocessing is that of one model, written out.
"""

import json
import sys

import numpy as np
import onnxruntime as ort
from PIL import Image

SIZE, SCALE = 256, 1 / 0.07
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

model, class_features, labels, image = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
image = Image.open(image).convert("RGB")
w, h = image.size
w, h = (SIZE, int(SIZE * h / w)) if w <= h else (int(SIZE * w / h), SIZE)
left, top = round((w - SIZE) / 2), round((h - SIZE) / 2)
image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
x = (np.asarray(image, np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
(features,) = session.run(
    None, {session.get_inputs()[0].name: np.ascontiguousarray(x.transpose(2, 0, 1)[None])}
)
scores = (features @ np.load(class_features).T)[0]
probability = np.exp(SCALE * (scores - scores.max()))
probability /= probability.sum()
with open(labels, encoding="utf-8") as f:
    words = json.load(f)
print(
    "\n".join(
        f"{words[i]}\t{probability[i]:.3f}\t{scores[i]:.3f}"
        for i in np.argsort(-scores, kind="stable")[:5]
    ),
    flush=True,
)

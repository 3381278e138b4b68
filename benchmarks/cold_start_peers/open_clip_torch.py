"""One image, ten baked labels, in torch: what a user of open_clip writes.

python open_clip_torch.py MODEL WEIGHTS CLASS_FEATURES.npy LABELS.json IMAGE

MODEL is a name, or a JSON file with the configuration of a model that open_clip does not list.
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

name, weights, class_features, labels, image = sys.argv[1:]
if name.endswith(".json"):
    open_clip.add_model_config(name)
    name = Path(name).stem
model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
model.eval()
with open(labels, encoding="utf-8") as f:
    words = json.load(f)
text_features = torch.from_numpy(np.load(class_features))
with torch.inference_mode():
    image_features = model.encode_image(
        preprocess(Image.open(image).convert("RGB"))[None], normalize=True
    )
    scores = (image_features @ text_features.T)[0]
    probability = (model.logit_scale.exp() * scores).softmax(dim=-1)
best = scores.argsort(descending=True)[:5].tolist()
print("\n".join(f"{words[i]}\t{probability[i]:.3f}\t{scores[i]:.3f}" for i in best), flush=True)

"""A recipe of everything, at its smallest; the folder of images is to be filled in."""

RECIPE = """
data: {kind: folders, name: shop, root: ROOT}
teacher:
  kind: open_clip
  model: tiny
  weights: random
  config:
    embed_dim: 8
    vision_cfg: {image_size: 32, layers: 1, width: 16, head_width: 8, patch_size: 16}
    text_cfg: {context_length: 12, vocab_size: 49408, width: 8, heads: 2, layers: 1}
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}
losses: {kl: {weight: 1}}
train: {epochs: 1, batch_size: 4, device: cpu}
"""

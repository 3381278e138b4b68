"""Train prompts in both encoders of an open_clip ViT teacher: ComKD's stage 1 by PromptSRC.

    loss = CE(q, label) + image_weight * |u - u0|_1 + text_weight * |w - w0|_1
           + logit_weight * KL(q0 || q) / (B * N)

u [B, D] are the prompted image features and w [N, D] the prompted class features of the N labeled
classes, unit rows; q = logit_scale * u w^T. u0, w0 and q0 are the frozen teacher's, w0 of its
template ensemble; L1 is the mean over elements. The prompts that are kept are the Gaussian-weighted
average of those after each epoch.

The prompts change the towers, so this runs before the cache is built, and their hash is part of the
teacher's identity. A class feature is that of the learned context and the class name; the same
holds of captions and, since the bundle's text encoder carries the context too, of words that are
typed on the board.

The towers stay frozen, and it runs in float32. Source: PromptSRC (arXiv 2307.06948); the values are
those of PromptKD's teacher (docs/design/methods.md#33-stage-1-by-prompts).
"""

import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device import finite, tokenizer
from edgeclip.device.images import ImageRef, read, refuse_unreadable, stream
from edgeclip.device.preprocess import normalize, open_image, prepared
from edgeclip.device.zero_shot import prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import teachers
from edgeclip.host.cache import apply_view, class_features, draw_views
from edgeclip.host.data import Dataset
from edgeclip.host.teachers import Teacher, TextTower
from edgeclip.host.teachers.open_clip import ImageTower, encoder
from edgeclip.host.towers.prompt_tokens import PromptedText, PromptedTower
from edgeclip.progress import say, track

TEMPLATES = ("{c}.",)
"""what a prompted teacher reads: the learned context stands before it"""


def with_prompts(
    teacher: Teacher, data: Dataset, classes: list[str], spec: R.Prompts, seed: int
) -> Teacher:
    """Return the teacher with prompts as they start, untrained.

    data: of stage 1; classes: what the teacher will name afterwards. Raises `EdgeclipError` where
    its towers take none, nothing is labeled, or a class name is too long behind the context.
    """
    torch.manual_seed(seed)
    prompted = _prompted(teacher, spec)
    if not data.labeled:
        raise EdgeclipError(
            data.name,
            "has no labeled images to adapt the teacher on",
            "set adapt to null, or label some",
        )
    assert prompted.text is not None
    _ids(prompted.text, [*data.classes, *classes])
    return prompted


def adapted(teacher: Teacher, spec: R.Prompts, folder: Path) -> Teacher:
    """Return the teacher with the prompts that `adapt` left in `folder`."""
    prompted = _prompted(teacher, spec)
    assert prompted.text is not None
    disk.verify(folder, disk.read_manifest(folder, "adapted teacher"))
    _set(
        {"image": prompted.tower.prompts, "text": prompted.text.module.prompts},
        load_file(folder / "prompts.safetensors"),
    )
    return prompted


def _prompted(teacher: Teacher, spec: R.Prompts) -> Teacher:
    assert isinstance(teacher.tower, ImageTower) and teacher.text is not None, (
        "a recipe's rules let open_clip teachers only come here"
    )
    tower = PromptedTower(teacher.tower.visual, spec.length, spec.depth).eval()
    text = _text_with_prompts(teacher.text, spec)
    return dataclasses.replace(
        teacher, name=f"{teacher.name}, prompted", tower=tower, text=text, encode_text=encoder(text)
    )


def _text_with_prompts(text: TextTower, spec: R.Prompts) -> TextTower:
    words = tokenizer.encode(text.words(), [spec.text_init])[0]
    init = torch.from_numpy(words[words != 0][1:-1])  # without start and end
    module = PromptedText(text.module.model, spec.length, spec.depth, init).eval()
    return dataclasses.replace(
        text, module=module, context_length=text.context_length - spec.length
    )


def _ids(text: TextTower, names: list[str]) -> Int[Tensor, "N L"]:
    return torch.from_numpy(tokenizer.encode(text.words(), prompts(names, TEMPLATES)))


def adapt(
    teacher: Teacher,
    prompted: Teacher,
    data: Dataset,
    recipe: R.Recipe,
    folder: Path,
    device: torch.device,
) -> Teacher:
    """Train `prompted`'s prompts, keep them in `folder`, and read them from there next time.

    teacher: the same without prompts, which the training holds on to. Raises `EdgeclipError` when
    the folder holds prompts of another teacher, or the loss is not finite.
    """
    spec = recipe.adapt
    assert isinstance(spec, R.Prompts) and prompted.text is not None
    learned = {"image": prompted.tower.prompts, "text": prompted.text.module.prompts}
    if (folder / disk.MANIFEST).exists():
        manifest = disk.read_manifest(folder, "adapted teacher")
        disk.verify(folder, manifest)
        if manifest["teacher"] != teacher.identity:
            raise EdgeclipError(
                folder,
                "holds prompts of another teacher",
                "use --fresh to start over, or another --out",
            )
        _set(learned, load_file(folder / "prompts.safetensors"))
    else:
        log = _train(learned, teacher, prompted, data, recipe, spec, device)
        for name, p in learned.items():
            finite.finite(
                p.detach().cpu().numpy(), f"stage 1: prompts of {name}s", "lower adapt.lr"
            )
        with disk.new_folder(folder) as temporary:
            save_file(
                {k: p.detach().cpu().contiguous() for k, p in learned.items()},
                temporary / "prompts.safetensors",
            )
            disk.write_manifest(
                temporary, "adapted teacher", {"teacher": teacher.identity, "log": log}
            )
    for module in (prompted.tower, prompted.text.module):
        module.cpu().requires_grad_(False)
    return dataclasses.replace(
        prompted,
        identity=teacher.identity | {"prompts": disk.sha256(folder / "prompts.safetensors")},
    )


def load_text(teacher: R.Teacher, spec: R.Prompts, folder: Path) -> TextTower:
    """Return the prompted text side alone: words get the context that was learned in `folder`."""
    text = _text_with_prompts(teachers.load_text(teacher), spec)
    disk.verify(folder, disk.read_manifest(folder, "adapted teacher"))
    _set({"text": text.module.prompts}, load_file(folder / "prompts.safetensors"))
    return text


def epoch_weights(epochs: int, mean: float, std: float) -> Float[Tensor, "E"]:
    """Gaussian weights of the epochs 1 to `epochs`, which sum to 1."""
    epoch = torch.arange(1, epochs + 1, dtype=torch.float64)
    return F.softmax(-((epoch - mean) ** 2) / (2 * std**2), dim=0)


def learning_rate(epoch: int, spec: R.Prompts) -> float:
    """Return an epoch's rate, from 0: constant during the warm-up, then a half cosine.

    As in PromptSRC's code the cosine starts after the warm-up and is as long as the whole training,
    so that it is cut off before its end.
    """
    if epoch < spec.warmup_epochs:
        return spec.warmup_lr
    turn = math.pi * (epoch - spec.warmup_epochs) / spec.epochs
    return spec.lr * (1 + math.cos(turn)) / 2


def losses(
    u: Float[Tensor, "B D"],
    u0: Float[Tensor, "B D"],
    w: Float[Tensor, "N D"],
    w0: Float[Tensor, "N D"],
    target: Tensor,
    logit_scale: float,
) -> dict[str, Float[Tensor, ""]]:
    """Return the four terms before their weights.

    target: int64 [B], indices into the N classes.
    """
    log_q = F.log_softmax(logit_scale * u @ w.T, dim=-1)
    log_q0 = F.log_softmax(logit_scale * u0 @ w0.T, dim=-1)
    kl = F.kl_div(log_q, log_q0, reduction="sum", log_target=True) / log_q.numel()
    return {
        "cross_entropy": F.cross_entropy(logit_scale * u @ w.T, target),
        "image": F.l1_loss(u, u0),
        "text": F.l1_loss(w, w0),
        "logit": kl,
    }


def _train(
    learned: dict[str, nn.Parameter],
    teacher: Teacher,
    prompted: Teacher,
    data: Dataset,
    recipe: R.Recipe,
    spec: R.Prompts,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Train the prompts in place; return the log, a row an epoch."""
    assert prompted.text is not None
    text = prompted.text
    images = _shots(data.labeled, spec.shots, recipe.seed)
    classes = sorted({p.label for p in images})
    names = [data.classes[c] for c in classes]
    w0 = torch.from_numpy(class_features(teacher, names, data.templates)).to(device)
    ids = text.module.without_padding(_ids(text, names)).to(device)
    _freeze_all_but(learned, [prompted.tower.to(device), text.module.to(device)])

    optimizer = torch.optim.SGD(
        learned.values(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
    )
    weight = {
        "cross_entropy": 1.0,
        "image": spec.image_weight,
        "text": spec.text_weight,
        "logit": spec.logit_weight,
    }
    average = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in learned.items()}
    log = []
    order = np.random.default_rng(recipe.seed)
    shares = epoch_weights(spec.epochs, spec.average_mean, spec.average_std).tolist()
    for epoch, share in enumerate(shares):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, spec)
        rows: list[dict[str, Tensor]] = []
        places = order.permutation(len(images)).tolist()
        batches = _batches(images, places, f"{recipe.seed} {epoch}", teacher, recipe, spec)
        title = f"stage 1: prompts, epoch {epoch + 1} of {spec.epochs}"
        for index, pixels in track(batches, title, math.ceil(len(images) / spec.batch_size)):
            x = torch.from_numpy(normalize(pixels, teacher.preprocess)).to(device)
            target = torch.tensor([classes.index(images[i].label) for i in index], device=device)
            with torch.no_grad():
                u0 = F.normalize(teacher.tower(x), dim=-1)
            u = F.normalize(prompted.tower(x), dim=-1)
            parts = losses(u, u0, text.module(ids), w0, target, teacher.logit_scale)
            loss = torch.stack([weight[k] * v for k, v in parts.items()]).sum()
            if not torch.isfinite(loss):
                raise EdgeclipError(
                    f"stage 1, epoch {epoch + 1}", f"the loss is {loss.item()}", "lower adapt.lr"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append({"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}})
        for k, p in learned.items():
            average[k] += share * p.detach().double()
        log.append({"epoch": epoch + 1, **_means(rows)})
    _set(learned, average)
    return log


def _freeze_all_but(learned: dict[str, nn.Parameter], towers: list[nn.Module]) -> None:
    """Freeze the towers, which the teacher with prompts and the one without share."""
    for tower in towers:
        tower.requires_grad_(False)
    for p in learned.values():
        p.requires_grad_(True)


def _means(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    means = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        means[name] = float(torch.stack(values).mean())
    return means


def _set(learned: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for k, p in learned.items():
            p.copy_(values[k])


def _shots(labeled: list[ImageRef], shots: int | None, seed: int) -> list[ImageRef]:
    """Return at most `shots` images of each class."""
    if shots is None:
        return labeled
    of_class: dict[int, list[ImageRef]] = {}
    for p in labeled:
        of_class.setdefault(p.label, []).append(p)
    drawn = []
    for label, own in sorted(of_class.items()):
        drawn += random.Random(f"{seed} {label}").sample(own, min(shots, len(own)))
    return drawn


def _batches(
    images: list[ImageRef],
    order: list[int],
    seed: str,
    teacher: Teacher,
    recipe: R.Recipe,
    spec: R.Prompts,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices [B], uint8 pixels [B, H, W, 3]): a fresh random view of every image.

    The views are of the kind that the recipe's are.
    """
    views = msgspec.structs.replace(recipe.views, count=2)

    def make(i: int) -> np.ndarray:
        image = open_image(read(images[i]), f"{images[i].path} ({images[i].key})")
        image = prepared(image, teacher.preprocess)
        rng = random.Random(f"{seed} {images[i].key}")
        view = draw_views(*image.size, views, rng)[1]
        return apply_view(image, view, teacher.preprocess)

    skipped: list[str] = []
    yield from stream(order, make, spec.batch_size, skipped, recipe.train.threads)
    refuse_unreadable(skipped, len(order), "stage 1")
    for line in skipped:
        say(f"skipped: {line}")

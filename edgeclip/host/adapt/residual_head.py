"""ComKD stage 1 for the assembled teacher: learn the domain from labeled classes without losing the
others.

The tower stays frozen; a residual head on its pooled features is trained with cross-entropy over
the labeled classes' text features and pulled toward the unadapted feature, which is all that
classes without labels have.

    u = norm(conse) + MLP(pooled)        MLP: LayerNorm, ReLU, dropout; last layer from zero

With `self_training` the images without labels are learned as well, from pseudo-labels that the head
gives them: its softmax over the classes, balanced by Sinkhorn-Knopp so that each class gets its
share of the images (the labeled ones fill their own). Unbalanced, a few classes draw all images to
themselves, because what the unadapted teacher knows of a class is uneven (SeLa, Asano et al. 2020;
SwAV, Caron et al. 2020).
"""

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device import finite
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.teachers import Teacher
from edgeclip.progress import track


class ResidualHead(nn.Module):
    """Rows [B, H + D] (pooled | unadapted feature) to adapted features [B, D]."""

    def __init__(self, width: int, embed_dim: int, spec: R.ResidualHead):
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(spec.dropout),
            nn.Linear(width, spec.hidden),
            nn.ReLU(),
            nn.Dropout(spec.dropout),
            nn.Linear(spec.hidden, embed_dim),
        )
        # the unadapted teacher is where it starts: a random residual is longer than the unit
        # feature that it is added to and drowns what is known of the classes without labels (on
        # clothing novel .51 against .88)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, rows: Float[Tensor, "B R"]) -> Float[Tensor, "B D"]:
        return F.normalize(rows[:, -self.embed_dim :], dim=-1) + self.mlp(
            rows[:, : -self.embed_dim]
        )


def adapt(
    teacher: Teacher,
    cache: TeacherCache,
    data: Dataset,
    spec: R.ResidualHead,
    seed: int,
    folder: Path,
) -> Teacher:
    """Return the teacher with a trained residual head.

    The head is kept in `folder` and read from there next time.
    """
    if not (folder / disk.MANIFEST).exists():
        torch.manual_seed(seed)
        head = ResidualHead(cache.rows.shape[2] - teacher.embed_dim, teacher.embed_dim, spec)
        _train(head, teacher, cache, data, spec, seed)
        for name, value in head.state_dict().items():
            finite.finite(value.numpy(), f"stage 1: weight '{name}'", "lower adapt.lr")
        with disk.new_folder(folder) as temporary:
            save_file(head.state_dict(), temporary / "head.safetensors")
            disk.write_manifest(
                temporary,
                "adapted teacher",
                {"teacher": teacher.identity, "cache": cache.folder.name},
            )
    manifest = disk.read_manifest(folder, "adapted teacher")
    if (manifest["teacher"], manifest["cache"]) != (teacher.identity, cache.folder.name):
        raise EdgeclipError(
            folder,
            "holds the head of another teacher, or of other data",
            "use --fresh to start over, or another --out",
        )
    return adapted(teacher, spec, folder)


def adapted(teacher: Teacher, spec: R.ResidualHead, folder: Path) -> Teacher:
    """Return the teacher with the residual head that `adapt` left in `folder`."""
    disk.verify(folder, disk.read_manifest(folder, "adapted teacher"))
    state = load_file(folder / "head.safetensors")
    head = ResidualHead(len(state["mlp.0.weight"]), teacher.embed_dim, spec)
    head.load_state_dict(state)
    return dataclasses.replace(
        teacher, name=f"{teacher.name}, adapted", features=head.eval().requires_grad_(False)
    )


def _train(
    head: ResidualHead,
    teacher: Teacher,
    cache: TeacherCache,
    data: Dataset,
    spec: R.ResidualHead,
    seed: int,
) -> None:
    rows, target, classes = _labeled_rows(cache, data)
    position = {c: i for i, c in enumerate(data.train_classes)}
    labeled = [position[c] for c in classes]
    names = torch.from_numpy(cache.class_features[data.train_classes])
    competing = labeled if spec.margin is None else list(range(len(names)))
    forward = torch.zeros(len(names))
    forward[labeled] = spec.margin or 0.0
    own = spec.self_training
    unlabeled = rows[:0]
    if own is not None:
        unlabeled = _unlabeled_rows(cache, data)
    known = F.one_hot(torch.tensor(labeled)[target], len(names)).float()
    pseudo = torch.empty(0)
    if spec.margin is not None:
        target = torch.tensor(labeled)[target]

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, spec.steps)
    head.train()
    for step in track(range(spec.steps), "stage 1: adapt the teacher", spec.steps):
        pick, r = _draw(rows, spec.batch_size, generator)
        u = F.normalize(head(r), dim=-1)
        unadapted = F.normalize(teacher.features(r), dim=-1)
        answers = teacher.logit_scale * u @ names[competing].T + forward[competing]
        loss = F.cross_entropy(answers, target[pick])
        loss = loss + spec.toward_unadapted * (1.0 - (u * unadapted).sum(dim=-1)).mean()
        if own is not None and step >= own.start:
            if (step - own.start) % own.every == 0:
                pseudo = pseudo_labels(head, unlabeled, names, teacher.logit_scale, known)
            pick, r = _draw(unlabeled, spec.batch_size, generator)
            answers = teacher.logit_scale * F.normalize(head(r), dim=-1) @ names.T
            loss = loss + own.weight * F.cross_entropy(answers, pseudo[pick])
        if not torch.isfinite(loss):
            raise EdgeclipError(
                f"stage 1, step {step + 1}", f"the loss is {loss.item()}", "lower adapt.lr"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _draw(
    rows: Float[Tensor, "n K R"], count: int, generator: torch.Generator
) -> tuple[Tensor, Float[Tensor, "B R"]]:
    """Return the places of some images, and their rows in a view each."""
    pick = torch.randint(len(rows), (count,), generator=generator)
    view = torch.randint(rows.shape[1], (count,), generator=generator)
    return pick, rows[pick, view]


def _labeled_rows(cache: TeacherCache, data: Dataset) -> tuple[Tensor, Tensor, list[int]]:
    """Return the labeled images' rows [n, K, R], their targets [n], and the classes these index."""
    label_of = {p.key: p.label for p in data.labeled}
    positions = [i for i, p in enumerate(cache.images) if p.key in label_of]
    if not positions:
        raise EdgeclipError(
            data.name,
            "has no labeled images to adapt the teacher on",
            "set adapt to null, or label some",
        )
    labels = [label_of[cache.images[i].key] for i in positions]
    classes = sorted(set(labels))
    target = torch.tensor([classes.index(label) for label in labels])
    return torch.from_numpy(cache.rows[positions].astype("float32")), target, classes


def _unlabeled_rows(cache: TeacherCache, data: Dataset) -> Tensor:
    """Return the rows [n, K, R] of the images that have no label."""
    labeled = {p.key for p in data.labeled}
    positions = [i for i, p in enumerate(cache.images) if p.key not in labeled]
    if not positions:
        raise EdgeclipError(
            "adapt.self_training", f"every image of {data.name} has a label", "set it to null"
        )
    return torch.from_numpy(cache.rows[positions].astype("float32"))


@torch.no_grad()
def pseudo_labels(
    head: nn.Module,
    rows: Float[Tensor, "n K R"],
    class_features: Float[Tensor, "C D"],
    logit_scale: float,
    known: Float[Tensor, "m C"],
) -> Float[Tensor, "n C"]:
    """Return the head's answers on the mean of an image's views.

    They are balanced with `known`, the labels of other images.
    """
    head.eval()
    views = [F.normalize(head(r), dim=-1) for r in rows.unbind(dim=1)]
    u = F.normalize(torch.stack(views).mean(dim=0), dim=-1)
    head.train()
    answers = (logit_scale * u @ class_features.T).softmax(dim=-1)
    return balanced(torch.cat([known, answers]))[len(known) :]


def balanced(probability: Float[Tensor, "n C"], rounds: int = 20) -> Float[Tensor, "n C"]:
    """Balance by Sinkhorn-Knopp: rows that sum to 1, columns of (nearly) one mass each.

    A one-hot row stays as it is.
    """
    share = len(probability) / probability.shape[1]
    for _ in range(rounds):
        probability = probability * (share / probability.sum(dim=0).clamp_min(1e-12))
        probability = probability / probability.sum(dim=1, keepdim=True)
    return probability

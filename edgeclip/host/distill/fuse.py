"""Several teachers made one: a linear map of their features into the first one's space.

MST-KD's common space (arXiv 2408.16563; a single layer was often its best adaptor), learned on
cached rows in seconds. The first teacher's class features stay what they are, so what is distilled
from the fusion takes new words from the first teacher's text encoder. The map starts as the first
teacher alone, and learns

    KL(average of the teachers' distributions, each with its own scale || fused)  on every image
    cross-entropy                                                                 where labeled

The average alone (no map) is what `other_teachers` means without `fuse`.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device import finite
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.distill.losses import log_average
from edgeclip.host.distill.targets import TeacherRows
from edgeclip.progress import track


class Fusion(nn.Module):
    """Map unit features [B, D], [B, E], ... to fused features [B, D], not normalized."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(widths), widths[0], bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(*self.linear.weight.shape))

    def forward(self, features: list[Float[Tensor, "B _"]]) -> Float[Tensor, "B D"]:
        return self.linear(torch.cat(features, dim=-1))


def fuse(
    teachers: list[TeacherRows], labels: np.ndarray, spec: R.Fuse, seed: int, folder: Path
) -> Fusion:
    """Return the map, learned or read from `folder`.

    labels: [n] of each cached image its place among the class features; -1 for none. Raises
    `EdgeclipError` when the folder holds the map of other teachers.
    """
    widths = [t.class_features.shape[1] for t in teachers]
    fusion = Fusion(widths)
    caches = [t.cache.folder.name for t in teachers]
    if not (folder / disk.MANIFEST).exists():
        _train(fusion, teachers, labels, spec, seed)
        for name, value in fusion.state_dict().items():
            finite.finite(value.cpu().numpy(), f"fusion: weight '{name}'", "lower fuse.lr")
        with disk.new_folder(folder) as temporary:
            save_file(fusion.state_dict(), temporary / "fusion.safetensors")
            disk.write_manifest(temporary, "fusion", {"widths": widths, "caches": caches})
    manifest = disk.read_manifest(folder, "fusion")
    if manifest["caches"] != caches:
        raise EdgeclipError(
            folder,
            "holds the fusion of other teachers, or of other data",
            "use --fresh to start over, or another --out",
        )
    disk.verify(folder, manifest)
    fusion.load_state_dict(load_file(folder / "fusion.safetensors"))
    return fusion.cpu().eval().requires_grad_(False)


def _train(
    fusion: Fusion, teachers: list[TeacherRows], labels: np.ndarray, spec: R.Fuse, seed: int
) -> None:
    order = np.random.default_rng(seed)
    first = teachers[0]
    views = first.cache.rows.shape[1]
    known = torch.zeros(len(first.class_features), dtype=torch.bool)
    known[labels[labels >= 0]] = True
    known = known.to(first.device)
    fusion = fusion.to(first.device)
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=spec.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.lr, spec.steps)
    for _ in track(range(spec.steps), "fuse the teachers", spec.steps):
        index = order.integers(len(labels), size=spec.batch_size)
        view = order.integers(views, size=spec.batch_size)
        features = [F.normalize(t.features(index, view), dim=-1) for t in teachers]
        answers = []
        for rows, teacher in zip(features, teachers, strict=True):
            answers.append((rows, teacher.class_features, teacher.logit_scale))
        target = log_average(answers, 1.0)
        q = first.logit_scale * F.normalize(fusion(features), dim=-1) @ first.class_features.T
        loss = F.kl_div(F.log_softmax(q, dim=-1), target, reduction="batchmean", log_target=True)
        own = torch.from_numpy(labels[index]).to(first.device)
        if spec.labels and (own >= 0).any():
            q = q.masked_fill(~known, -torch.inf)
            loss = loss + spec.labels * F.cross_entropy(q, own, ignore_index=-1)
        if not torch.isfinite(loss):
            raise EdgeclipError("fuse the teachers", f"the loss is {loss.item()}", "lower fuse.lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

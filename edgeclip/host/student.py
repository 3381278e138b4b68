"""Build, save and load the student.

That is an image tower and PromptKD's projector P into the teacher's space and, where the recipe
asks, a text tower beside it. On disk it is weights and JSON, and it is rebuilt only from those:

    student/student.safetensors   tower.* (with visual prompts: tower.vit.*, tower.prompts),
                                  projector.*, head.*, text.*
            class_features.npy    [N, D] float32, unit, of the class names: the teacher's or its own
            tokenizer.json        of its own text tower
            student.json          labels, architecture, preprocess, EduAttention, parents
"""

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device import finite, tokenizer
from edgeclip.device.cleaning import Cleaning
from edgeclip.device.manifest import ClassOffset
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.zero_shot import EduAttention, ensemble, prompts
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import older
from edgeclip.host import recipe as R
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers.open_clip import ImageTower
from edgeclip.host.towers import weights
from edgeclip.host.towers.inherit import inherit_from
from edgeclip.host.towers.prompt_tokens import PromptedTower
from edgeclip.host.towers.share import SharedBlocks, share
from edgeclip.host.towers.stem import put_stem
from edgeclip.host.towers.tokenization import Tokenization, tokenization


class Student(nn.Module):
    """Pixels [B, 3, H, W] to P(u_s), unit rows [B, D] in the teacher's space: what ships."""

    def __init__(self, tower: nn.Module, width: int, embed_dim: int, hidden: int | None):
        super().__init__()
        self.tower = tower
        if hidden is None:
            self.projector: nn.Module = nn.Linear(width, embed_dim)
        else:
            self.projector = nn.Sequential(
                nn.Linear(width, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, embed_dim),
            )

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.projector(self.tower(pixels)), dim=-1)


class EduAttentionHead(nn.Module):
    """Equations 6 and 7: u + alpha * softmax(FC(u) W^T / C) W, as unit rows, in the reading that
    the recipe gives.

    Q is the student's feature, K and V are the class features; alpha starts at 0, so the FC has no
    gradient until alpha has moved.
    """

    def __init__(
        self, embed_dim: int, spec: R.EduAttention, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.spec = spec
        self.fc = nn.Linear(embed_dim, embed_dim)
        self.alpha = nn.Parameter(torch.zeros(()), requires_grad=spec.learn_alpha)
        self.log_temperature = nn.Parameter(
            torch.tensor(spec.temperature).log(), requires_grad=spec.learn_temperature
        )
        # A generator of its own: with alpha frozen at 0 the rest of the run is bit for bit
        # PromptKD's.
        bound = embed_dim**-0.5
        for p in self.fc.parameters():
            nn.init.uniform_(p, -bound, bound, generator=generator)
        if spec.fc_start == "identity":
            nn.init.eye_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        image_features: Float[Tensor, "B D"],
        class_features: Float[Tensor, "N D"],
        raw: Float[Tensor, "B D"] | None = None,
        residual: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """raw: P(u_s) before its norm was divided out, for `query: raw`; residual: what equation 7
        adds to, image_features if None."""
        spec = self.spec
        query = image_features if raw is None else raw
        key = class_features
        if spec.center:
            key = key - key.mean(dim=0)
        if spec.fc == "query":
            query = self.fc(query)
        if spec.fc == "key_value":
            key = self.fc(key)
        scores = query @ key.T / self.log_temperature.exp()
        over = 0 if spec.axis == "batch" else 1
        attention = F.softmax(scores, dim=over) @ key
        if spec.fc == "output":
            attention = self.fc(attention)
        u = image_features if residual is None else residual
        added = self.alpha * attention
        if not spec.normalize:
            return u + added
        # u has norm 1, so the sum's norm is known without it: at alpha = 0 this is u bit for bit,
        # which is PromptKD.
        cross = (u * added).sum(dim=-1, keepdim=True)
        square = 1.0 + 2.0 * cross + (added * added).sum(dim=-1, keepdim=True)
        return (u + added) * square.clamp(min=1e-12).rsqrt()

    def numpy(self) -> EduAttention | None:
        """Return the same head for the device layer.

        None for a reading that needs more than one image's unit feature.
        """
        if self.spec.query == "raw" or self.spec.axis == "batch":
            return None
        weight, bias = (p.detach().float().cpu().numpy() for p in (self.fc.weight, self.fc.bias))
        return EduAttention(
            weight,
            bias,
            self.alpha.item(),
            self.log_temperature.exp().item(),
            self.spec.fc,
            self.spec.normalize,
            self.spec.center,
        )


class StudentText(nn.Module):
    """A text tower and a linear projector into the teacher's space.

    input_ids [N, L] to unit features [N, D].
    """

    def __init__(self, tower: nn.Module, width: int, embed_dim: int):
        super().__init__()
        self.tower = tower
        self.projector = nn.Linear(width, embed_dim)

    def forward(self, input_ids: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        return F.normalize(self.projector(self.tower.encode_text(input_ids)), dim=-1)


def build(spec: R.Student, embed_dim: int) -> tuple[Student, Preprocess]:
    """Return a student with its tower's weights and a fresh projector, and its preprocess.

    The projector's width is asked of the tower by one dry run. Raises `EdgeclipError` for a tower
    that does not take images of the asked size.
    """
    tower, preprocess = image_tower(spec.tower)
    if spec.inherit:
        inherit_from(tower, image_tower(spec.inherit)[0])
    if spec.stem:
        preprocess = put_stem(tower, spec.stem, preprocess)
    if spec.share:
        share(tower, spec.share)
    if visual := spec.visual_prompts:
        vit = tower.visual if isinstance(tower, ImageTower) else tower
        tower = PromptedTower(vit, visual.length, visual.depth)
        tower.vit.requires_grad_(not visual.freeze_tower)
    try:
        with torch.inference_mode():
            width = tower.eval()(torch.zeros(1, 3, preprocess.size, preprocess.size)).shape[1]
    except (AssertionError, RuntimeError) as e:  # windows or positions of another size
        reason = str(e).splitlines()[0]
        raise EdgeclipError(
            f"student.tower: {spec.tower.model}",
            f"does not take images of {preprocess.size} px ({reason})",
            "give the image_size that its name says, or choose another model",
        ) from None
    return Student(tower, width, embed_dim, spec.projector_hidden).eval(), preprocess


def resolved(spec: R.Student) -> R.Student:
    """Return the spec with all said that changes its towers' functions: on disk it is rebuilt
    without the weights that this was taken from."""
    tower = weights.resolved(spec.tower)
    text = weights.resolved(spec.text) if spec.text else None
    return msgspec.structs.replace(spec, tower=tower, text=text)


def assumed_of(spec: R.Student) -> Json:
    """Return what nobody told of the towers' weights, by the part of the student."""
    parts = {"tower": spec.tower, "text": spec.text}
    told = {name: weights.assumed_of(part).told for name, part in parts.items() if part}
    return {name: fields for name, fields in told.items() if fields}


def image_tower(spec: R.Timm | R.OpenClip) -> tuple[nn.Module, Preprocess]:
    """Return an image tower with its weights and its preprocess: pixels [B, 3, H, W] to features
    [B, T]."""
    if isinstance(spec, R.OpenClip):
        model, preprocess = weights.open_clip_model(spec, image_only=True)
        return ImageTower(model), preprocess
    tower, preprocess = weights.timm_model(spec)
    if isinstance(tower, VisionTransformer):
        tower.set_input_size(img_size=spec.image_size)  # resamples its positional embedding
    return tower, preprocess


def checkpoint_gradients(tower: nn.Module) -> None:
    """Make the tower keep its blocks' inputs only, and compute the rest again going backward.

    Raises `EdgeclipError` where the tower's code cannot.
    """
    blocks = [m for m in tower.modules() if hasattr(m, "grad_checkpointing")]
    if not blocks or any(isinstance(m, PromptedTower | SharedBlocks) for m in tower.modules()):
        raise EdgeclipError(
            "train.gradient_checkpointing",
            "this student's tower cannot do it",
            "set it to false; accumulate saves memory too",
        )
    for module in blocks:
        module.grad_checkpointing = True


def build_text(spec: R.OpenClip, embed_dim: int, made: Tokenization | None = None) -> TextTower:
    """Return a student's text tower with its weights and a fresh projector.

    made: its tokenizer; None: open_clip's of that model.
    """
    model, _ = weights.open_clip_model(spec)
    model.visual = model.logit_scale = None  # the image side is another tower
    made = made or tokenization(spec)
    known = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings
    needed = Tokenizer.from_str(made.tokenizer).get_vocab_size()
    if known < needed:
        raise EdgeclipError(
            f"student.text: {spec.model}",
            f"has a vocabulary of {known}, its tokenizer has {needed}",
            f"give vocab_size: {needed}",
        )
    with torch.inference_mode():
        width = model.encode_text(torch.zeros(1, model.context_length, dtype=torch.long)).shape[1]
    return TextTower(
        module=StudentText(model, width, embed_dim).eval(),
        tokenizer=made.tokenizer,
        cleaning=made.cleaning,
        context_length=int(model.context_length),
    )


def token_ids(text: TextTower, texts: list[str], truncate: bool = False) -> Int[Tensor, "N L"]:
    """Return the padded ids of texts.

    truncate: a text that is longer than the context loses its end, as captions do; otherwise it
    raises `EdgeclipError`.
    """
    return torch.from_numpy(tokenizer.encode(text.words(), texts, truncate))


@torch.inference_mode()
def text_features(text: TextTower, texts: list[str]) -> Float[Tensor, "N D"]:
    """Return unit features of the student's own text tower, float32, on the CPU."""
    ids = token_ids(text, texts).to(next(text.module.parameters()).device)
    return torch.cat([text.module(part) for part in ids.split(256)]).float().cpu()


def class_features(text: TextTower, classes: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """Return [N, D] unit class features: the prompt ensemble of each class name, by `text`."""
    features = text_features(text, prompts(classes, templates)).numpy()
    return ensemble(features.reshape(len(classes), len(templates), -1))


# --- on disk


TRAIN_AGAIN = "train it again with a lower learning rate"


def save(
    folder: Path,
    student: Student,
    head: EduAttentionHead | None,
    description: Json,
    class_features: np.ndarray,
    text: TextTower | None = None,
) -> None:
    """Write the student's folder. class_features: [N, D] of description["labels"].

    Raises `EdgeclipError` for a weight or a class feature that is not finite: nothing is written.
    """
    modules: dict[str, nn.Module] = {"": student}
    if head is not None:
        modules["head."] = head
    if text is not None:
        modules["text."] = text.module
    state = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            state[f"{prefix}{name}"] = value.contiguous().cpu()
    weights.refuse_broken(state, f"{folder}: student", TRAIN_AGAIN)
    finite.features(class_features, f"{folder}: class features", TRAIN_AGAIN)
    with disk.new_folder(folder) as temporary:
        if text is not None:
            disk.write_text(temporary / "tokenizer.json", text.tokenizer)
        save_file(state, temporary / "student.safetensors")
        disk.write_array(temporary / "class_features.npy", class_features)
        disk.write_json(temporary / "student.json", description)
        disk.write_manifest(temporary, "student", {})


class Saved(NamedTuple):
    """A student's folder, compared with its hashes and read once."""

    folder: Path
    description: Json
    """student.json"""
    spec: R.Student
    """its architecture, all weights random: they come from `state`, and what the recipe started
    from need not be at hand any more"""
    state: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of one part, "head." or "text.", under their own names."""
        names = [name for name in self.state if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.state[name] for name in names}


def read(folder: Path) -> Saved:
    """Read a student's folder. Raises `EdgeclipError` where it is not whole, or not finite."""
    disk.verify(folder, disk.read_manifest(folder, "student"))
    description = older.student_description(disk.read_json(folder / "student.json"))
    spec = msgspec.convert(description["architecture"], R.Student)
    parts = {"tower": spec.tower, "stem": spec.stem, "text": spec.text}
    fresh = {
        name: msgspec.structs.replace(part, weights="random")
        for name, part in parts.items()
        if part is not None
    }
    spec = msgspec.structs.replace(spec, inherit=None, **fresh)
    state = load_file(folder / "student.safetensors")
    weights.refuse_broken(state, f"{folder}: student", TRAIN_AGAIN)
    return Saved(folder, description, spec, state)


class Loaded(NamedTuple):
    """A student that was trained, in eval mode."""

    student: Student
    head: EduAttentionHead | None
    """None: it was trained without EduAttention"""
    preprocess: Preprocess
    description: Json


def load(source: Path | Saved) -> Loaded:
    """Return the student of a folder, or of one that `read` has read."""
    saved = read(source) if isinstance(source, Path) else source
    description = saved.description
    student, _ = build(saved.spec, description["embed_dim"])
    others = ("head.", "text.")
    tensors = {k: v for k, v in saved.state.items() if not k.startswith(others)}
    student.load_state_dict(tensors)
    head = None
    if description["edu_attention"] is not None:
        spec = msgspec.convert(description["edu_attention"], R.EduAttention)
        head = EduAttentionHead(description["embed_dim"], spec)
        head.load_state_dict(saved.part("head."))
    preprocess = msgspec.convert(description["preprocess"], Preprocess)
    return Loaded(student.eval(), head, preprocess, description)


def class_offset(description: Json) -> ClassOffset | None:
    """Return what a student's classes with labels are set back by; None: nothing, as in 0.1."""
    return msgspec.convert(description.get("class_offset"), ClassOffset | None)


def load_text(source: Path | Saved) -> TextTower | None:
    """Return the student's own text tower; None where it has none."""
    saved = read(source) if isinstance(source, Path) else source
    if saved.spec.text is None:
        return None
    words = (saved.folder / "tokenizer.json").read_text(encoding="utf-8")
    cleaning = msgspec.convert(saved.description.get("cleaning"), Cleaning | None)
    made = Tokenization(words, cleaning)
    text = build_text(saved.spec.text, saved.description["embed_dim"], made)
    text.module.load_state_dict(saved.part("text."))
    return text

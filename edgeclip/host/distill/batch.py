"""What a loss may read: the features of one batch, of the student and of its teachers.

Shapes: B images, D embedding width, E another teacher's, N classes of the training class list.
Features are unit rows unless they are called raw. Letters as in the papers: v, s are the student's
image and text features, V, T the teacher's.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class OtherTeacher(NamedTuple):
    """A further teacher, in a space of its own."""

    features: Float[Tensor, "B E"]
    class_features: Float[Tensor, "N E"]
    caption_features: Float[Tensor, "B E"] | None
    logit_scale: float


class Batch(NamedTuple):
    """What teacher and student say of some images."""

    image_features: Float[Tensor, "B D"]
    """v = P(u_s), what ships"""
    head_features: Float[Tensor, "B D"]
    """after EduAttention; the same tensor without it"""
    teacher_features: Float[Tensor, "B D"]
    """V"""
    class_features: Float[Tensor, "N D"]
    caption_features: Float[Tensor, "B D"] | None
    """T, of each image's caption"""
    logit_scale: float
    """the teacher's, already exponentiated; frozen"""
    text_features: Float[Tensor, "B D"] | None = None
    """s, of a student with a text tower"""
    raw_features: Float[Tensor, "B D"] | None = None
    """P(u_s) before its norm was divided out"""
    raw_teacher_features: Float[Tensor, "B D"] | None = None
    masked_features: Float[Tensor, "B D"] | None = None
    """v of the same images with most patches hidden"""
    labels: Int[Tensor, " B"] | None = None
    """rows of class_features; -1 where an image has no label"""
    prototypes: Float[Tensor, "N D"] | None = None
    """mean teacher feature of each class's labeled images; zero rows where there are none"""
    other_teachers: tuple[OtherTeacher, ...] = ()
    offsets: Float[Tensor, " N"] | None = None
    """what the first teacher's scores of classes with labels are set back by; None: nothing"""
    learned: nn.ParameterDict | None = None
    """what losses learn beside the student: `learned_parameters`"""

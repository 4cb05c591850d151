"""Distribution matching (DMD, DMD2) as two terms that are weighted, placed and normalised apart (Decoupled DMD).

    x0_fake_score - x0_guided  =  (x0_fake_score - x0_c)  +  (1 - guidance) (x0_c - x0_u)
                                       matching                 augmentation

`x0_c` and `x0_u` are the teacher's estimates with the prompt and with the empty one; the fake score is never guided.
Every estimate is [B, C, h, w]; terms and directions are float32 and carry no gradient.
"""

from __future__ import annotations

from torch import Tensor


def matching_term(x0_teacher: Tensor, x0_fake_score: Tensor) -> Tensor:
    """x0_fake_score - x0_teacher: zero when the student's distribution is the teacher's (DMD eq. 7)."""
    return (x0_fake_score - x0_teacher).float().detach()


def augmentation_term(x0_teacher: Tensor, x0_unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """(1 - guidance) (x0_c - x0_u): what guidance adds to the matching term; needs no fake score (Decoupled DMD).

    `guidance` is one number for all samples, or one per sample [B, 1, 1, 1].
    """
    return ((1 - guidance) * (x0_teacher - x0_unconditional)).float().detach()


def skip_term(x0_teacher: Tensor, x0_skip: Tensor, scale: Tensor) -> Tensor:
    """- scale (x0_c - x0_skip): what skip-layer guidance of `scale` [B, 1, 1, 1] adds to the augmentation term (our choice).

    `x0_skip` is the teacher's estimate with the prompt and without some of its blocks.
    """
    return (-scale * (x0_teacher - x0_skip)).float().detach()


def distance(x0_student: Tensor, x0_teacher: Tensor) -> Tensor:
    """Mean |x0_student - x0_teacher| per sample, [B, 1, 1, 1]: DMD's normaliser."""
    return (x0_student - x0_teacher).float().abs().mean(dim=(1, 2, 3), keepdim=True).detach()


def normalise(term: Tensor, scale: Tensor, *, floor: float) -> Tensor:
    """term / max(scale, floor) (DMD eq. 8); `floor` > 0 bounds the result where student and teacher agree."""
    return term / scale.clamp_min(floor)


def matching_loss(x0_student: Tensor, direction: Tensor) -> Tensor:
    """Surrogate whose gradient with respect to `x0_student` is `direction` / numel. Gradient: `x0_student` only."""
    return 0.5 * (x0_student - (x0_student - direction).detach()).square().mean()

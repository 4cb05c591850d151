"""The proxy (fake score): a flow model of what the student paints."""

from __future__ import annotations

from torch import Tensor


def proxy_loss(v_proxy: Tensor, x0_student: Tensor, eps: Tensor) -> Tensor:
    """Flow matching on the student's finished samples: mean |v - (eps - x0)|^2. Gradient: `v_proxy` only.

    Fitted on full rollouts, not on per-step x0 estimates: those are no samples, and a perfect student would be
    pushed away from the teacher (our choice; tests/objectives has the toy proof).
    """
    return (v_proxy - (eps - x0_student).detach()).square().mean()

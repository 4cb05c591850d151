"""Sigma grids as plain floats, first 1 (noise) and last 0 (data)."""

from __future__ import annotations

from flashgen.errors import UsageError


def shift(u: float, k: float) -> float:
    """SD3's timestep shift (SD3 eq. 23): [0, 1] to itself; k > 1 moves nodes towards noise."""
    return k * u / (1 + (k - 1) * u)


def shifted_grid(n: int, k: float) -> list[float]:
    """`n` evaluations at shift(1), shift((n-1)/n), ..., shift(1/n), then 0; n = 4, k = 3: 1, .9, .75, .5, 0 (our choice).

    Teachers and students share this rule, so a grid is a subset of every grid with a multiple of its steps.
    """
    return [shift(i / n, k) for i in range(n, 0, -1)] + [0.0]


def check_nested(nodes: list[float], fine: list[float]) -> None:
    """Raises UsageError when `fine`, the grid of the trajectories that a student learns, lacks one of the student's `nodes`."""
    if missing := [f"{node:.3g}" for node in nodes if node not in fine]:
        raise UsageError(
            f"distill.trajectory.teacher_steps={len(fine) - 1} skips the student's sigma {', '.join(missing)}; "
            "--set distill.trajectory.teacher_steps=N with the N that the student, or the one that it started from, was distilled with"
        )

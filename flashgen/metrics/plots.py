"""Plots that stages leave in their artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_allocation(table: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Damage against bytes of every choice of every group, one line a group, the choice that was taken filled.

    `table` is {group: {bits, damage: {bits: d}, bytes: {bits: b}}}, bits being whole numbers.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({_kind(group) for group in table})
    named: set[str] = set()
    for group, row in table.items():
        kind = _kind(group)
        color = f"C{kinds.index(kind)}"
        points = sorted((row["bytes"][bits] / 1e3, row["damage"][bits]) for bits in row["damage"])
        axes.plot(*zip(*points, strict=True), color=color, lw=0.7, marker="o", mfc="w", ms=4, label="" if kind in named else kind)
        axes.plot(row["bytes"][row["bits"]] / 1e3, row["damage"][row["bits"]], "o", color=color, ms=5)
        named.add(kind)
    axes.set(xscale="log", yscale="log", xlabel="kB of the group", ylabel="damage to the final latents, this group alone")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _kind(group: str) -> str:
    """`transformer_blocks.3 attention in` is of the kind `attention in`; a layer outside of blocks is of none."""
    return group.partition(" ")[2] or "outside of blocks"

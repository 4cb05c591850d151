"""Plots that stages leave in their artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_allocation(table: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a plot of error against bytes: one line per group of layers with a marker per choice of bits, filled for the chosen one.

    `table` is {group: {bits, damage: {bits: error of the final latents}, bytes: {bits: size}}}; bits are whole numbers.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    classes = sorted({_class(group) for group in table})
    labelled: set[str] = set()
    for group, row in table.items():
        layer_class = _class(group)
        color = f"C{classes.index(layer_class)}"
        points = sorted((row["bytes"][bits] / 1e3, row["damage"][bits]) for bits in row["damage"])
        label = "" if layer_class in labelled else layer_class
        axes.plot(*zip(*points, strict=True), color=color, lw=0.7, marker="o", mfc="w", ms=4, label=label)
        axes.plot(row["bytes"][row["bits"]] / 1e3, row["damage"][row["bits"]], "o", color=color, ms=5)
        labelled.add(layer_class)
    axes.set(xscale="log", yscale="log", xlabel="kB of the group", ylabel="squared error of the final latents, this group alone")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _class(group: str) -> str:
    """Class of the layers in a group: `attention in` for `transformer_blocks.3 attention in`."""
    return group.partition(" ")[2] or "outside of blocks"

"""Anti-aliased rendering of scenes from signed distances."""

from __future__ import annotations

import numpy as np

from flashgen.worlds.shapes.scene import BACKGROUNDS, COLORS, SIZE_PX, Item, Scene


def coverage(item: Item, size_px: int = SIZE_PX) -> np.ndarray:
    """Fraction of each pixel that the shape covers, [size, size] in 0..1 (our choice: clamp(1/2 - distance))."""
    centres = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    x, y = (centres[None] - np.float32(item.x)), (centres[:, None] - np.float32(item.y))
    distance = signed_distance(item.shape, x / item.radius, y / item.radius) * (item.radius * size_px)
    return np.clip(0.5 - distance, 0, 1)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the unit-size outline, negative inside; y points down. All shapes have similar area."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 1.0)
    if shape == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) - 0.88)
    if shape == "triangle":  # upright, equilateral: apex at y = -1.3, base at y = +0.75
        return np.asarray(np.maximum(y - 0.75, 0.8660254 * abs(x) - 0.5 * y - 0.65))
    if shape == "cross":  # two bars of half-width 0.36
        bars = np.minimum(np.maximum(abs(x) - 1.05, abs(y) - 0.36), np.maximum(abs(y) - 1.05, abs(x) - 0.36))
        return np.asarray(bars)
    raise ValueError(f"unknown shape '{shape}'")


def render(scene: Scene, size_px: int = SIZE_PX) -> np.ndarray:
    """uint8 picture [size, size, 3]."""
    image = np.empty((size_px, size_px, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        alpha = coverage(item, size_px)[..., None]
        image += alpha * (np.asarray(COLORS[item.color], np.float32) - image)
    return np.asarray(np.round(image), np.uint8)

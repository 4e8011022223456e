"""Marks that scenes are drawn with, as signed distances: outlines of things, patterns on them, textures of surfaces.

Lengths are in pixels of the mark; they are pixels of the picture where it is drawn flat. edge: the width over which a mark fades into what
is around it, a number or a tensor like the coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EDGE = 1.5  # sharper edges in the picture do not survive 8 x 8 compression


def wrap(offset: Tensor, period: float) -> Tensor:
    return torch.remainder(offset + period / 2, period) - period / 2


def fade(distance: Tensor, edge: float | Tensor = EDGE) -> Tensor:
    """Signed distance in pixels (negative inside) -> coverage of the pixel, 0..1."""
    return (0.5 - distance / edge).clamp(0, 1)


def select(index: Tensor, *options: Tensor) -> Tensor:
    result = options[0]
    for number, option in enumerate(options[1:], 1):
        result = torch.where(index == number, option, result)
    return result


def outline_distance(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline, in the order of SHAPES."""
    length = (dx.square() + dy.square()).sqrt()
    square = torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius
    triangle = torch.maximum(dx.abs() * 0.866 - dy * 0.5, dy) - 0.58 * radius
    # fold the plane into half of one of five arms, then measure the distance to the line from the tip to the notch
    arm = 2 * math.pi / 5
    angle = wrap(torch.atan2(dx, -dy), arm).abs()
    tip, notch = 1.15, 0.5
    edge_x, edge_y = notch * math.cos(arm / 2) - tip, notch * math.sin(arm / 2)
    norm = math.hypot(edge_x, edge_y)
    star = ((length * angle.cos() - tip * radius) * edge_y - length * angle.sin() * edge_x) / norm
    ring = (length - 0.72 * radius).abs() - 0.3 * radius
    return select(shape, length - radius, square, triangle, star, ring)


def pattern_tone(dx: Tensor, dy: Tensor, pattern: Tensor, edge: float | Tensor = EDGE) -> Tensor:
    """Brightness 0..1 of the thing at an offset from its centre, in the order of PATTERNS."""
    stripes = fade(wrap(dy, 14).abs() - 3.5, edge)
    dots = fade((wrap(dx, 16).square() + wrap(dy, 16).square()).sqrt() - 4.5, edge)
    return select(pattern, torch.ones_like(dx), 0.35 + 0.65 * stripes, 1 - 0.65 * dots)


def texture_mark(x: Tensor, y: Tensor, texture: Tensor, edge: float | Tensor = EDGE) -> Tensor:
    """Brightness 0..1 of the background, in the order of TEXTURES. Periods divide 64, hence both sides."""
    dots = fade((wrap(x, 32).square() + wrap(y, 32).square()).sqrt() - 9, edge)
    stripes = fade(wrap(x + y, 32).abs() / 2**0.5 - 5.6, edge)
    checks = fade(EDGE * (0.5 - 8 * triangle_wave(x, 64) * triangle_wave(y, 64)), edge)
    waves = fade(wrap(y + 7 * torch.sin(x * (2 * math.pi / 64)), 32).abs() - 8, edge)
    return select(texture, dots, stripes, checks, waves)


def triangle_wave(x: Tensor, period: float) -> Tensor:
    """-1..1, zero at the multiples of half a period."""
    return 1 - wrap(x - period / 4, period).abs() / (period / 4)

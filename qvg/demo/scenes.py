"""Procedural scenes: textured shapes that move over a textured, panning background, each with an exact description.

The image wraps around: shapes that leave at one edge enter at the opposite one, and the period of every background texture divides both
sides. So a scene never ends, and its description is true for a video of any length.

    scenes = [random_scene(generator) for _ in range(8)]
    video = render(place(scenes, generator), frames=81)         # [8, 3, 81, 128, 192] in -1..1
    prompts = [str(scene) for scene in scenes]

The whole batch is drawn together with signed distances, on the device of the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .marks import fade, outline_distance, pattern_tone, texture_mark, wrap
from .prompts import COLOURS, DIRECTIONS, PATTERNS, SHAPES, TEXTURES, Background, Motion, Scene, Thing

WIDTH, HEIGHT = 192, 128
RADII = (18.0, 26.0)
JITTER = 20.0  # pixels of random offset of a thing with a fixed place


@dataclass
class Layout:
    """A batch of scenes as tensors, in pixels and pixels per frame, (right, down). N things per scene, the first in front."""

    shape: Tensor  # [B, N] index into SHAPES
    pattern: Tensor  # [B, N] index into PATTERNS
    colour: Tensor  # [B, N, 3] in 0..1
    present: Tensor  # [B, N] 0 or 1
    centre: Tensor  # [B, N, 2] in frame 0
    radius: Tensor  # [B, N]
    velocity: Tensor  # [B, N, 2]
    texture: Tensor  # [B] index into TEXTURES
    ground: Tensor  # [B, 3]
    phase: Tensor  # [B, 2] the background's offset in frame 0
    pan: Tensor  # [B, 2]

    def to(self, device) -> Layout:
        return Layout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _choice(generator: torch.Generator, options: Sequence):
    return options[int(torch.randint(len(options), (), generator=generator))]


def random_scene(generator: torch.Generator) -> Scene:
    """One or two things of different colours over a background of a third."""
    order = torch.randperm(len(COLOURS), generator=generator).tolist()
    colours = [tuple(COLOURS)[index] for index in order]
    things = tuple(
        Thing(colours[index], _choice(generator, PATTERNS), _choice(generator, SHAPES), Motion() if verb == "still" else
              Motion(verb, _choice(generator, tuple(DIRECTIONS))))
        for index, verb in enumerate(_choice(generator, ("still", "moving", "moving", "racing", "racing"))
                                     for _ in range(_choice(generator, (1, 2, 2)))))
    pan = Motion("panning", _choice(generator, tuple(DIRECTIONS))) if _choice(generator, (0, 1, 1)) else Motion()
    return Scene(things, Background(colours[2], _choice(generator, TEXTURES), pan))


def place(scenes: Sequence[Scene], generator: torch.Generator, free: bool = True) -> Layout:
    """Draw at random what the description leaves open: positions and sizes of the things, and the offset of the texture.

    free: positions are anywhere. Otherwise the first thing starts about on the left and the second about on the right, with the same size
    and texture offset: a model trained on that has little to guess at the start, and few sampling steps suffice.
    """
    batch = len(scenes)
    blank = Thing()
    things = [(*scene.things, blank, blank)[:2] for scene in scenes]
    frame = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    random = torch.rand(batch, 4, 2, generator=generator)
    if free:
        centre = random[:, :2] * frame
        # the second thing starts about half a frame away, so that the two never overlap at first
        centre[:, 1] = (centre[:, 0] + ((random[:, 1] - 0.5) * 0.4 + 0.5) * frame) % frame
        radius = RADII[0] + (RADII[1] - RADII[0]) * random[:, 2]
        phase = 64 * random[:, 3]
    else:
        centre = torch.tensor([[0.28, 0.5], [0.72, 0.5]]) * frame + 2 * JITTER * (random[:, :2] - 0.5)
        radius = torch.full((batch, 2), sum(RADII) / 2)
        phase = torch.zeros(batch, 2)

    def numbers(read, of=things):
        return torch.tensor([[read(thing) for thing in pair] for pair in of])

    return Layout(
        shape=numbers(lambda thing: SHAPES.index(thing.shape)),
        pattern=numbers(lambda thing: PATTERNS.index(thing.pattern)),
        colour=numbers(lambda thing: COLOURS[thing.colour]),
        present=torch.tensor([[float(index < len(scene.things)) for index in range(2)] for scene in scenes]),
        centre=centre,
        radius=radius,
        velocity=numbers(lambda thing: thing.motion.velocity),
        texture=torch.tensor([TEXTURES.index(scene.background.texture) for scene in scenes]),
        ground=torch.tensor([COLOURS[scene.background.colour] for scene in scenes]),
        phase=phase,
        pan=torch.tensor([scene.background.motion.velocity for scene in scenes]))


def render(layout: Layout, frames: int, first: int = 0) -> Tensor:
    """Draw frames `first` to `first + frames - 1`: [B, 3, frames, HEIGHT, WIDTH] in -1..1 on the layout's device."""
    device = layout.centre.device
    time = torch.arange(first, first + frames, device=device).view(1, -1, 1, 1)
    x = torch.arange(WIDTH, device=device).view(1, 1, 1, -1) + 0.5
    y = torch.arange(HEIGHT, device=device).view(1, 1, -1, 1) + 0.5

    def at(value: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1]
        return value.view(-1, 1, 1, 1)

    mark = texture_mark(
        x - at(layout.phase[:, 0]) - time * at(layout.pan[:, 0]),
        y - at(layout.phase[:, 1]) - time * at(layout.pan[:, 1]), at(layout.texture))
    picture = (0.16 + 0.34 * mark).unsqueeze(1) * layout.ground.view(-1, 3, 1, 1, 1)
    for index in reversed(range(layout.shape.shape[1])):
        centre = layout.centre[:, index]
        velocity = layout.velocity[:, index]
        dx = wrap(x - at(centre[:, 0]) - time * at(velocity[:, 0]), WIDTH)
        dy = wrap(y - at(centre[:, 1]) - time * at(velocity[:, 1]), HEIGHT)
        cover = fade(outline_distance(dx, dy, at(layout.radius[:, index]), at(layout.shape[:, index])))
        cover = (cover * at(layout.present[:, index])).unsqueeze(1)
        tone = pattern_tone(dx, dy, at(layout.pattern[:, index])).unsqueeze(1)
        picture = picture + cover * (tone * layout.colour[:, index].view(-1, 3, 1, 1, 1) - picture)
    return picture * 2 - 1

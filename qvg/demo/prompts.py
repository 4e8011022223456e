"""The tiny model's language: short clauses, every word of which the model was trained on.

    red striped circle moving right, blue square still, over green dots panning left

One or two shapes, each with a colour, a pattern and a motion, and after "over" a background: a colour, a texture and a panning
direction. The defaults are white, plain and still. There is no text encoder: each word has its own axis, and so has each place in the
sentence; `embed_prompt` marks which word is at which place. Unknown words are refused, because the model could only ignore them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT_DIM = 64
TOKENS = 16
PLACES = 16

COLOURS = {
    "red": (0.95, 0.15, 0.15), "orange": (1.0, 0.55, 0.1), "yellow": (0.98, 0.9, 0.2), "green": (0.2, 0.85, 0.3),
    "cyan": (0.2, 0.9, 0.95), "blue": (0.2, 0.35, 1.0), "purple": (0.6, 0.25, 0.95), "pink": (1.0, 0.45, 0.8),
    "white": (0.95, 0.95, 0.95),
}
PATTERNS = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "star", "ring")
TEXTURES = ("dots", "stripes", "checks", "waves")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# verb -> pixels per frame
SPEEDS = {"moving": 1.25, "racing": 2.5, "panning": 0.75}

WORDS = (*COLOURS, *PATTERNS, *SHAPES, *TEXTURES, "still", *SPEEDS, *DIRECTIONS)
FILLERS = ("a", "an", "the", "and", "with", "background")


@dataclass(frozen=True)
class Motion:
    """`still`, or a verb and a direction."""

    verb: str = "still"
    direction: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.direction}".strip()

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame, (right, down)."""
        if self.verb == "still":
            return 0.0, 0.0
        right, down = DIRECTIONS[self.direction]
        return right * SPEEDS[self.verb], down * SPEEDS[self.verb]


@dataclass(frozen=True)
class Thing:
    colour: str = "white"
    pattern: str = "plain"
    shape: str = "circle"
    motion: Motion = Motion()

    def __str__(self) -> str:
        return f"{self.colour} {self.pattern} {self.shape} {self.motion}"

    def words(self) -> list[str]:
        return [self.colour, self.pattern, self.shape, self.motion.verb, self.motion.direction]


@dataclass(frozen=True)
class Background:
    colour: str = "white"
    texture: str = "dots"
    motion: Motion = Motion()

    def __str__(self) -> str:
        return f"over {self.colour} {self.texture} {self.motion}"

    def words(self) -> list[str]:
        return [self.colour, self.texture, self.motion.verb, self.motion.direction]


@dataclass(frozen=True)
class Scene:
    """The content of a prompt. The first thing is in front of the second."""

    things: tuple[Thing, ...]
    background: Background = Background()

    def __str__(self) -> str:
        return ", ".join([*map(str, self.things), str(self.background)])


def vocabulary() -> str:
    return (
        f"colours {', '.join(COLOURS)}; patterns {', '.join(PATTERNS)}; shapes {', '.join(SHAPES)}; "
        f"motions still, or moving or racing {', '.join(DIRECTIONS)}; and after 'over' a colour, "
        f"{', '.join(TEXTURES)}, and still or panning with a direction")


def parse_prompt(text: str) -> Scene:
    """Parse a prompt. Raises ValueError, with the vocabulary, for words that the tiny model does not know."""
    words = re.findall(r"[a-z]+|[^a-z\s,;.]+", text.lower())
    unknown = sorted({word for word in words if word not in WORDS and word not in (*FILLERS, "over")})
    if unknown:
        raise ValueError(
            f"The tiny model does not know {', '.join(map(repr, unknown))}. It was trained on these words only: "
            f"{vocabulary()}. Example: red striped circle moving right, over green dots panning left.")
    things, background = [], Background()
    for clause in re.split(r"[,;.]|(?=\bover\b)", text.lower()):
        said = [word for word in re.findall(r"[a-z]+", clause) if word not in FILLERS]
        if said and said[0] == "over":
            background = _background(said[1:], clause.strip())
        elif said:
            things.append(_thing(said, clause.strip()))
    if not 1 <= len(things) <= 2:
        raise ValueError(
            f"The prompt has {len(things)} things; the tiny model draws one or two. "
            "Put a comma between them and 'over' before the background.")
    return Scene(tuple(things), background)


def _take_(said: list[str], choices, clause: str) -> list[str]:
    """Remove the word of one kind from `said`, in place, and return it in a list; at most one is allowed."""
    found = [word for word in said if word in choices]
    if len(found) > 1:
        raise ValueError(
            f"'{clause}' says both {found[0]} and {found[1]}; use one of {', '.join(choices)}, "
            "and a comma between two things.")
    said[:] = [word for word in said if word not in choices]
    return found


def _motion(said: list[str], verbs: tuple[str, ...], clause: str) -> Motion:
    verb, direction = _take_(said, (*verbs, "still"), clause), _take_(said, tuple(DIRECTIONS), clause)
    if direction and verb != ["still"]:
        return Motion(*(verb or verbs[:1]), *direction)
    if direction or verb not in ([], ["still"]):
        raise ValueError(
            f"'{clause}' does not say where it goes: say still, or {' or '.join(verbs)} "
            f"with one of {', '.join(DIRECTIONS)}.")
    return Motion()


def _refuse_rest(said: list[str], clause: str, what: str) -> None:
    if said:
        words = ", ".join(map(repr, said))
        raise ValueError(f"'{clause}' uses {words} for {what}. The tiny model knows {vocabulary()}.")


def _thing(said: list[str], clause: str) -> Thing:
    motion = _motion(said, ("moving", "racing"), clause)
    parts = {name: _take_(said, choices, clause) for name, choices in
             (("colour", tuple(COLOURS)), ("pattern", PATTERNS), ("shape", SHAPES))}
    _refuse_rest(said, clause, "a thing")
    if not parts["shape"]:
        raise ValueError(f"'{clause}' names no shape; use one of {', '.join(SHAPES)}.")
    return Thing(motion=motion, **{name: found[0] for name, found in parts.items() if found})


def _background(said: list[str], clause: str) -> Background:
    motion = _motion(said, ("panning",), clause)
    parts = {"colour": _take_(said, tuple(COLOURS), clause), "texture": _take_(said, TEXTURES, clause)}
    _refuse_rest(said, clause, "a background")
    return Background(motion=motion, **{name: found[0] for name, found in parts.items() if found})


def embed_scene(scene: Scene) -> Tensor:
    """[1, TOKENS, TEXT_DIM] float32: one token per word, with its word axis and its place axis set; unused tokens are zero."""
    blank = [""] * len(Thing().words())
    things = [thing.words() for thing in scene.things] + [blank] * (2 - len(scene.things))
    words = [*things[0], *things[1], *scene.background.words()]
    embedding = torch.zeros(1, TOKENS, TEXT_DIM)
    for place, word in enumerate(words):
        if word:
            # a value of 8 gives a token of 64 channels about unit variance, which the network's first layer expects
            embedding[0, place, WORDS.index(word)] = embedding[0, place, TEXT_DIM - PLACES + place] = 8 / 2**0.5
    return embedding


def embed_prompt(text: str) -> Tensor:
    """A prompt as input of the tiny model's cross-attention, [1, TOKENS, TEXT_DIM] float32."""
    return embed_scene(parse_prompt(text))

"""The kernels by the names that `qvg.dispatch` knows them by."""

from __future__ import annotations

from triton.runtime import JITFunction

from .assign import assign, assign_kernel
from .decode import read
from .encode import encode
from .rotate import rotate, turn_chunk
from .update import update

OPS = {"assign": assign, "update": update, "encode": encode, "rotate": rotate, "turn": turn_chunk, "decode": read}
INTERPRETED = not isinstance(assign_kernel, JITFunction)

"""The kernels by the names that `qvg.backends.dispatch` knows them by."""

from __future__ import annotations

from triton.runtime import JITFunction

from .assign import assign, assign_kernel
from .encode import encode
from .kmeans import kmeans
from .reader import read, recover
from .rotate import rotate, turn_chunk
from .store import store
from .update import update

OPS = {
    "assign": assign, "update": update, "kmeans": kmeans, "store": store, "encode": encode, "rotate": rotate, "turn": turn_chunk,
    "decode": read, "recover": recover,
}
INTERPRETED = not isinstance(assign_kernel, JITFunction)

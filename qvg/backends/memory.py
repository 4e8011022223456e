"""Whether an error says that memory ran out, in the words of every device."""

from __future__ import annotations

import torch

# torch has a type for devices alone; what a CPU's allocator, MPS, cuBLAS and a kernel's launch say are RuntimeErrors
_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether less memory in use would have kept this error away."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words.lower() in str(error).lower() for words in _WORDS)

"""Recognizing an error that means out of memory, on every device."""

from __future__ import annotations

import torch

# torch has its own type for GPUs only; the CPU allocator, MPS, cuBLAS and kernel launches raise RuntimeError
_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether the error means out of memory, so that a retry with less in use may succeed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words.lower() in str(error).lower() for words in _WORDS)

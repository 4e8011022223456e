"""Which functions torch.compile may compile.

A node may compile the whole network (TorchCompileModel) or each block, before or after a node of this pack. Compiled code reads the state
of a run once, when it is traced: core's node even drops the guards of `transformer_options`, where core keeps that state. So functions
that read or change the state of a run are `eager`. Functions that pass it to the network are an `eager_shell`: they are not
compiled, but what they call may be. Attention is a graph break in both cases, and the code on both sides of it is still compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

# core's key in model_options for the arguments of torch.compile
COMPILE_ARGUMENTS = "torch_compile_kwargs"


def eager(function: Callable) -> Callable:
    """A decorator: the function and everything it calls run uncompiled."""
    return torch.compiler.disable(function, reason="reads and writes the KV cache")


def eager_shell(function: Callable) -> Callable:
    """A decorator: the function itself runs uncompiled; what it calls may be compiled."""
    return torch.compiler.disable(function, recursive=False, reason="reads the state of a run")


def original(module: nn.Module) -> nn.Module:
    """The original of a compiled module, or the module itself."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


class EagerCall:
    """A callable that compiled code calls. The code is compiled for this class, so it is valid for all its instances."""

    def __init__(self, called: Callable[..., Tensor]):
        self.called = called

    @eager
    def __call__(self, *args, **kwargs) -> Tensor:
        return self.called(*args, **kwargs)


def check_compiled(model_options: dict) -> None:
    """Raises ValueError where a node demands a single graph (fullgraph), which cannot contain the cache."""
    if (model_options.get(COMPILE_ARGUMENTS) or {}).get("fullgraph"):
        raise ValueError("A node compiles this model with fullgraph, but a KV cache cannot be part of a single graph. Turn fullgraph off "
                         "in that node.")

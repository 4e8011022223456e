"""What torch.compile may look into, and what it must leave alone.

A node may compile the network as a whole (TorchCompileModel) or block by block, before or behind a node of this pack. Compiled code sees a
run's state once, when it is traced: core's node even leaves out the guards of `transformer_options`, where core keeps that state. So what
reads or changes the state of a run is `outside` of compiled code, and what hands it to the network `between`: it runs as it is, and what
it calls is compiled. To attend is one step of Python either way, so that code on both sides of it is still compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

# core's name in model_options for what a node gave to torch.compile
COMPILE_ARGUMENTS = "torch_compile_kwargs"


def outside(function: Callable) -> Callable:
    """The function, neither compiled nor what it calls."""
    return torch.compiler.disable(function, reason="reads and writes the KV cache")


def between(function: Callable) -> Callable:
    """The function, not compiled; what it calls may be."""
    return torch.compiler.disable(function, recursive=False, reason="reads the state of a run")


def bare(module: nn.Module) -> nn.Module:
    """The module that was compiled, or the module itself."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


class Outside:
    """A callable that compiled code calls. Code is compiled for the class and so holds for each of its objects."""

    def __init__(self, called: Callable[..., Tensor]):
        self.called = called

    @outside
    def __call__(self, *args) -> Tensor:
        return self.called(*args)


def check_compiled(model_options: dict) -> None:
    """Raises ValueError where a node asked for compiled code in one piece, which a cache cannot be part of."""
    if (model_options.get(COMPILE_ARGUMENTS) or {}).get("fullgraph"):
        raise ValueError("A node compiles this model with fullgraph, but a KV cache stays outside of compiled code. Turn fullgraph off in "
                         "that node.")

"""A hash of a network's weights, by which a session recognizes the model that it was made with.

Weights may be packed: a GGUF tensor reports the shape of the matrix that it represents, holds a buffer of another shape, and its layer
returns a state dict without data. So the hash reads the tensors in memory, whatever their class reports. The hash of a network of plain
tensors must never change, because it is stored in sessions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

SAMPLED_ELEMENTS = 64


def fingerprint(network: nn.Module, changing: Collection[str] = ()) -> str:
    """32 hex digits from every tensor's name, shape and 64 of its elements, so that billions of parameters take seconds.

    changing: names of tensors whose values change over time, such as those that a LoRA is added to while they are on the GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in _stored(network):
        digest.update(f"{name} {tuple(tensor.shape)} {name in changing}".encode())
        if name not in changing and not tensor.is_meta:
            flat = tensor.flatten()
            # rounded because a loader may hold a weight in another dtype while it is in use
            sample = flat[::max(1, flat.numel() // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS].float().bfloat16()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _stored(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and plain tensor of every parameter and buffer of a network."""
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    for name, tensor in network.state_dict().items():
        if tensor.is_meta and name not in own:
            continue  # a placeholder of a loader, not a weight
        yield from _plain(name, own[name] if tensor.is_meta else tensor)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as torch's own class; the inner tensors of a subclass that wraps several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
        return
    # a subclass may override shape and slicing
    with torch._C.DisableTorchFunctionSubclass():
        yield name, tensor.as_subclass(Tensor).detach()

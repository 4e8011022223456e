"""A short name of a network's weights, by which a session knows the model that it was made with.

Weights may be packed: a GGUF tensor shows the shape of the matrix that it stands for, holds bytes of another, and its layer gives out a
state dict without numbers. So what is read is what lies in memory, whatever a tensor's class says about it; a network of plain tensors
has the same name as ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

SAMPLED_NUMBERS = 64


def fingerprint(network: nn.Module, changing: Collection[str] = ()) -> str:
    """A hash of every tensor's name, shape and 64 of its numbers, so that billions take seconds.

    changing: names of tensors whose numbers depend on the moment (such as those that a LoRA is added to while they are on the GPU).
    """
    digest = hashlib.sha256()
    for name, tensor in _stored(network):
        digest.update(f"{name} {tuple(tensor.shape)} {name in changing}".encode())
        if name not in changing and not tensor.is_meta:
            flat = tensor.flatten()
            # rounded, because a loader may hold a weight in another type while it is in use
            sample = flat[::max(1, flat.numel() // SAMPLED_NUMBERS)][:SAMPLED_NUMBERS].float().bfloat16()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _stored(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and plain tensor of all that a network holds."""
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    for name, tensor in network.state_dict().items():
        if tensor.is_meta and name not in own:
            continue  # room that a loader asks for, not a weight
        yield from _plain(name, own[name] if tensor.is_meta else tensor)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as torch's own class; of one that is made of several, all of them."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
        return
    # a subclass may answer for itself what its shape is, and what a slice of it
    with torch._C.DisableTorchFunctionSubclass():
        yield name, tensor.as_subclass(Tensor).detach()

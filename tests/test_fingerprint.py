"""A network's fingerprint: packed weights of every kind that loaders keep, and the names that older sessions hold."""

import hashlib

import pytest
import torch
from torch import nn

from comfyui_qvg.qvg.models.fingerprint import fingerprint

ROWS, COLUMNS, BLOCK, BLOCK_BYTES = 8, 64, 32, 34


class PackedTensor(torch.Tensor):
    """What a GGUF loader keeps: bytes in blocks, under the shape of the matrix that they stand for; never copied, detached or cloned."""

    def __new__(cls, data, shape):
        return super().__new__(cls, data)

    def __init__(self, data, shape):
        super().__init__()
        self.tensor_shape = shape

    @property
    def shape(self):
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()

    def detach(self):
        return self

    def clone(self):
        return self


class PackedLinear(nn.Module):
    """A layer over such a tensor, whose state dict has no numbers and asks for room to unpack in."""

    def __init__(self, data, shape=None):
        super().__init__()
        self.weight = nn.Parameter(PackedTensor(data, torch.Size(shape or (ROWS, COLUMNS))), requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
        destination[f"{prefix}temp.weight"] = torch.empty(ROWS, COLUMNS, device="meta")


def packed_network(seed=0, shape=None):
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (ROWS, COLUMNS // BLOCK * BLOCK_BYTES), dtype=torch.uint8, generator=draw)
    network = nn.Sequential(PackedLinear(data, shape), nn.LayerNorm(COLUMNS), PackedLinear(data.flip(0), shape))
    return network.requires_grad_(False)


def test_packed_weights():
    assert fingerprint(packed_network()) == fingerprint(packed_network())
    assert fingerprint(packed_network()) != fingerprint(packed_network(seed=1))
    for layer in (0, 2):
        changed = packed_network()
        with torch._C.DisableTorchFunctionSubclass():
            changed[layer].weight.as_subclass(torch.Tensor).add_(1)
        assert fingerprint(packed_network()) != fingerprint(changed)
    assert fingerprint(packed_network(), {"0.weight"}) == fingerprint(packed_network(), {"0.weight"}) != fingerprint(packed_network())


def test_a_packed_shape_is_not_believed():
    """Loaders differ in what they call the shape of the same bytes, from release to release."""
    assert fingerprint(packed_network()) == fingerprint(packed_network(shape=(COLUMNS, ROWS)))


def test_weights_that_are_nowhere_yet():
    """Such as those of a network that a loader has only laid out: names and shapes are all there is."""
    with torch.device("meta"):
        networks = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9)]
    first, same, other = map(fingerprint, networks)
    assert first == same != other


def test_plain_networks_keep_the_name_that_sessions_hold():
    network = nn.Sequential(nn.Linear(300, 70), nn.BatchNorm1d(70)).bfloat16()
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        flat = tensor.flatten()
        sample = flat[::max(1, flat.numel() // 64)][:64].float().bfloat16()
        digest.update(f"{name} {tuple(tensor.shape)} False".encode() + sample.view(torch.int16).numpy().tobytes())
    assert fingerprint(network) == digest.hexdigest()[:32]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_weight_held_otherwise_in_use_is_the_same(kept):
    """Of a network in E4M3 or bf16 a loader may hold some weights in a wider type while it samples."""
    network = nn.Linear(16, 16)
    network.weight.data = network.weight.data.bfloat16().to(kept)
    before = fingerprint(network)
    network.weight.data = network.weight.data.float()
    assert fingerprint(network) == before

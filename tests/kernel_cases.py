"""What the tests of kernels share: the device, the dtypes, tokens, and an op run by its kernel and by its reference."""

import torch

from comfyui_qvg.qvg import backends

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
# products of bf16 are wrong in the interpreter
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]


def tokens(*shape, seed=0, dtype=torch.float32, clusters=6):
    """Tokens in clusters, with channels of unequal size, as in keys."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) + 3 * torch.randn(clusters, shape[-1], generator=draw)[torch.randint(
        clusters, shape[:-1], generator=draw)]
    return (x * torch.logspace(-1, 1, shape[-1])).to(dtype).to(DEVICE)


def both(op, *arguments):
    """The results of the kernel and of the reference."""
    with backends.force("triton"):
        ours = op(*arguments)
    with backends.force("torch"):
        return ours, op(*arguments)

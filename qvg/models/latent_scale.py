"""Between the latents of a VAE and those that a network makes, which have about zero mean and unit variance.

ComfyUI's LATENT, and so its files, hold the VAE's. The number of channels says whose they are: 16 are of Wan 2.1, 48 of Wan 2.2 and 32 of
HunyuanVideo 1.5. Sources: Wan 2.2, wan/modules/vae2_2.py; HunyuanVideo-1.5, the configuration of its VAE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .wan_vae import MEAN, STD

MEAN_WAN22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
STD_WAN22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)
SCALE_HUNYUAN = 1.03682
# channels -> (mean, standard deviation) of the VAE's latents
SCALES = {16: (MEAN, STD), 48: (MEAN_WAN22, STD_WAN22), 32: ((0.0,) * 32, (1 / SCALE_HUNYUAN,) * 32)}


def to_vae(x: Tensor) -> Tensor:
    """Latents [B, C, F, H, W] of a network -> those of the VAE. Raises ValueError for a number of channels that no VAE here has."""
    mean, std = _scale(x)
    return x * std + mean


def to_network(z: Tensor) -> Tensor:
    """The inverse of `to_vae`."""
    mean, std = _scale(z)
    return (z - mean) / std


def _scale(x: Tensor) -> list[Tensor]:
    if x.shape[1] not in SCALES:
        raise ValueError(f"Latents of {x.shape[1]} channels are those of no known VAE; there are {', '.join(map(str, SCALES))}.")
    return [torch.tensor(values, device=x.device, dtype=x.dtype).view(1, -1, 1, 1, 1) for values in SCALES[x.shape[1]]]

"""The Wan 2.1 video autoencoder in plain torch: video [B, 3, 4F-3, 8H, 8W] in -1..1, latents [B, 16, F, H, W].

Every convolution over time is causal: its input is the current frame and the two before it. So a latent frame can be decoded as soon as it
exists, given the last input frames of each convolution. These are kept in a plain dict (module -> frames), called memory, that is passed
through all layers. An empty dict means that the video begins. The first video frame is encoded as one latent frame, and each later latent
frame represents four video frames; so a still image is a video of one frame.

Parameter names and sizes are Wan's own (base width 96 in the released file), so the same file opens in ComfyUI's VAELoader.
Source: Wan 2.1, wan/modules/vae.py; checked against ComfyUI's comfy/ldm/wan/vae.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Memory = dict[nn.Module, Tensor]

CHANNELS = 16
WIDTHS = (1, 2, 4, 4)
HALVES_TIME = (False, True, True)

# the video network reads latents as (z - MEAN) / STD, per channel. Source: Wan 2.1, wan/modules/vae.py
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


def normalize(z: Tensor) -> Tensor:
    """Latents of the encoder -> latents for the video network (about zero mean, unit variance). [B, 16, F, H, W]."""
    return (z - _per_channel(MEAN, z)) / _per_channel(STD, z)


def denormalize(x: Tensor) -> Tensor:
    """Latents of the video network -> latents for the decoder. [B, 16, F, H, W]."""
    return x * _per_channel(STD, x) + _per_channel(MEAN, x)


class CausalConv3d(nn.Conv3d):
    """Convolution that pads time on the left only: with the frames before, or with zeros where the video begins.

    Computed as a 2D convolution over each frame concatenated with its predecessors along channels: fast kernels exist for that at every
    width, but not for 3D convolutions with few channels (15 times slower at 8 channels on a CPU).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.reach = kernel[0] - 1

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        weight = self.weight
        if self.reach:
            frames, past = x.shape[2], memory.get(self)
            alone = past is None and frames == 1
            x = F.pad(x, (0, 0, 0, 0, self.reach, 0)) if past is None else torch.cat([past, x], dim=2)
            memory[self] = x[:, :, -self.reach:]
            if alone:
                # the input of the other taps is zero
                x, weight = x[:, :, -1:], weight[:, :, -1:]
            else:
                # [B, F, H, W, C] in memory, so that concatenating predecessors to a frame's channels is one copy
                last = x.permute(0, 2, 3, 4, 1).contiguous()
                x = torch.cat([last[:, tap:tap + frames] for tap in range(self.reach + 1)], dim=-1).permute(0, 4, 1, 2, 3)
        # [O, I, taps, h, w] -> [O, taps * I, h, w]
        weight = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return each_frame(lambda image: F.conv2d(image, weight, self.bias, padding=self.padding[1:]), x)


def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image layer to every frame of x [B, C, F, H, W]; channels are last in memory, so that reshaping does not copy."""
    images = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return layer(images).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Unit-length channel vectors times sqrt(channels) times gamma."""

    def __init__(self, channels: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        length = x.square().sum(1, keepdim=True, dtype=torch.float32).sqrt().clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / length).to(x.dtype) * self.gamma.to(x.dtype)


class Chain(nn.Sequential):
    """A Sequential that passes the memory to the layers that use it."""

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        for layer in self:
            x = layer(x, memory) if isinstance(layer, REMEMBERING) else layer(x)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        # index 5 is Wan's dropout, which has no weights
        self.residual = Chain(
            ChannelNorm(inputs), nn.SiLU(), CausalConv3d(inputs, outputs, 3),
            ChannelNorm(outputs), nn.SiLU(), nn.Identity(), CausalConv3d(outputs, outputs, 3))
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        kept = x if self.shortcut is None else self.shortcut(x, memory)
        return kept + self.residual(x, memory)


class FrameAttention(nn.Module):
    """One-head attention among the pixels of a frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + each_frame(self._attend, x)

    def _attend(self, image: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(image)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.squeeze(1).transpose(1, 2).reshape_as(image))


class Downsample(nn.Module):
    """Halve height and width and, with `time`, the frames after the first."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        last = memory.get(self)
        memory[self] = x[:, :, -1:]
        if last is not None:
            return self.time_conv(torch.cat([last, x], dim=2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width and, with `time`, the frames after the first; channels are halved."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            first, rest = (x[:, :, :1], x[:, :, 1:]) if self not in memory else (None, x)
            # only the presence of this entry matters: it marks that the first frame was processed
            memory[self] = x[:, :, :0]
            parts = [] if first is None else [first]
            if rest.shape[2]:
                # [B, 2C, F, H, W] -> [B, C, 2F, H, W]: the halves of the channels are a frame's two successors
                pairs = self.time_conv(rest, memory).unflatten(1, (2, -1))
                parts.append(torch.stack(pairs.unbind(1), dim=3).flatten(2, 3))
            x = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return each_frame(self.resample, x)


REMEMBERING = (CausalConv3d, ResidualBlock, Downsample, Upsample)


def middle(channels: int) -> Chain:
    return Chain(ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels))


def output(channels: int, outputs: int) -> Chain:
    return Chain(ChannelNorm(channels), nn.SiLU(), CausalConv3d(channels, outputs, 3))


class Encoder(nn.Module):
    def __init__(self, base: int):
        super().__init__()
        widths = [base * width for width in (1, *WIDTHS)]
        self.conv1 = CausalConv3d(3, widths[0], 3)
        layers: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            layers += [ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs)]
            if stage < len(HALVES_TIME):
                layers.append(Downsample(outputs, HALVES_TIME[stage]))
        self.downsamples = Chain(*layers)
        self.middle = middle(widths[-1])
        self.head = output(widths[-1], 2 * CHANNELS)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.downsamples(self.conv1(x, memory), memory)
        return self.head(self.middle(x, memory), memory)


class Decoder(nn.Module):
    def __init__(self, base: int):
        super().__init__()
        widths = [base * width for width in (WIDTHS[-1], *WIDTHS[::-1])]
        self.conv1 = CausalConv3d(CHANNELS, widths[0], 3)
        self.middle = middle(widths[0])
        doubles_time = HALVES_TIME[::-1]
        layers: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            # an Upsample before this stage has halved the channels
            inputs = inputs // 2 if stage else inputs
            layers += [ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs), ResidualBlock(outputs, outputs)]
            if stage < len(doubles_time):
                layers.append(Upsample(outputs, doubles_time[stage]))
        self.upsamples = Chain(*layers)
        self.head = output(widths[-1], 3)

    def forward(self, z: Tensor, memory: Memory) -> Tensor:
        x = self.middle(self.conv1(z, memory), memory)
        return self.head(self.upsamples(x, memory), memory)

    def memory_shapes(self, shape: tuple[int, ...], frames: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the memory's entries after `frames` latent frames of `shape` (B, C, H, W), by layer name."""
        batch, _, height, width = shape
        found: dict[str, tuple[int, ...]] = {}
        stages = (("conv1", self.conv1), ("middle", self.middle), *self.upsamples.named_children(), ("head", self.head))
        for name, stage in stages:
            for inner, layer in stage.named_modules(prefix=f"upsamples.{name}" if name.isdigit() else name):
                if isinstance(layer, Upsample) and layer.time_conv is not None:
                    found[inner] = (batch, layer.time_conv.in_channels, 0, height, width)
                elif isinstance(layer, CausalConv3d) and layer.reach and (frames > 1 or not inner.endswith("time_conv")):
                    found[inner] = (batch, layer.in_channels, layer.reach, height, width)
            if isinstance(stage, Upsample):
                height, width = 2 * height, 2 * width
        return found if frames else {}


class WanVAE(nn.Module):
    """The autoencoder with base width `base`. Its latents are unnormalized: see `normalize`."""

    def __init__(self, base: int = 96):
        super().__init__()
        self.encoder = Encoder(base)
        self.conv1 = CausalConv3d(2 * CHANNELS, 2 * CHANNELS, 1)
        self.conv2 = CausalConv3d(CHANNELS, CHANNELS, 1)
        self.decoder = Decoder(base)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> WanVAE:
        """The autoencoder that a state dict describes, weights loaded strictly, in `dtype` (default: as stored).

        Raises ValueError for a state dict of something else.
        """
        if "decoder.head.0.gamma" not in state_dict:
            raise ValueError(
                "This is not a Wan 2.1 VAE state dict: decoder.head.0.gamma is missing. "
                "Load wan_2.1_vae.safetensors or a file with its layout.")
        with torch.device("meta"):
            vae = cls(state_dict["decoder.head.0.gamma"].shape[0])
        vae.load_state_dict({key: value.to(dtype or value.dtype) for key, value in state_dict.items()}, assign=True)
        return vae.requires_grad_(False).eval()

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, 16, F, H, W] of video [B, 3, 4F-3, 8H, 8W] in -1..1. Raises ValueError for other sizes."""
        if (video.shape[2] - 1) % 4 or video.shape[3] % 8 or video.shape[4] % 8:
            raise ValueError(
                f"The video is {video.shape[2]} frames of {video.shape[4]} x {video.shape[3]}; the Wan VAE takes "
                "4n + 1 frames with a width and height that are multiples of 8. Crop it to the nearest such size.")
        mean, log_variance = self.conv1(self.encoder(video, {}), {}).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 4F-3, 8H, 8W] in -1..1 -> latents [B, 16, F, H, W] (the mean)."""
        return self.posterior(video)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, 16, F, H, W] -> video [B, 3, 4F-3, 8H, 8W], about -1..1, the whole video in one pass."""
        return self.decoder(self.conv2(z, {}), {})

    def decode_frames(self, z: Tensor) -> Iterator[Tensor]:
        """The same, one latent frame at a time: yields one video frame, then four at a time, in constant memory."""
        memory: Memory = {}
        for index in range(z.shape[2]):
            yield self.decoder(self.conv2(z[:, :, index:index + 1], {}), memory)

"""What makes the video of `qvg generate`: the tiny model, or a released checkpoint with its VAE and text embeddings from files.

A video that is written as latents needs no VAE, and of HY-WorldPlay's there is none in the pack. Text encoders are not part of it either,
so with a checkpoint a prompt is the number of an embedding: "1" is the first of the file, and a schedule may name several. The embedding
that guidance leads away from is the file's `negative`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..measure.inputs import NEGATIVE, Embeddings, open_network, open_vae, read_embeddings
from ..models import FAMILIES, Family
from ..models.wan_vae import CHANNELS, WanVAE
from ..video import Schedule
from ..video.latent_file import SUFFIX
from ..video.walk_job import KINDS, WalkInputs
from .walk_inputs import read_walk


@dataclass(frozen=True)
class Source:
    """Files of a model; none for the tiny one. latents: the video is written as latents. Raises ValueError where a file is missing."""

    checkpoint: Path | None = None
    vae: Path | None = None
    embeddings: Path | None = None
    latents: bool = False

    def __post_init__(self):
        given = {"checkpoint": self.checkpoint, "vae": self.vae, "embeddings": self.embeddings}
        missing = [f"--{name}" for name, path in given.items() if path is None]
        if 0 < len(missing) < len(given) and not (self.latents and missing == ["--vae"]):
            way = f", or give --out a {SUFFIX} file, of which VAE Decode in ComfyUI makes the video" if missing == ["--vae"] else ""
            raise ValueError(f"--checkpoint, --vae and --embeddings belong together, but there is no {' and no '.join(missing)}. Give all "
                             f"three, or none for the tiny model{way}.")
        for name, path in given.items():
            if path is not None and not path.is_file():
                raise ValueError(f"There is no file {path}. Give the --{name} file of the model.")

    def open(self, device: str) -> Opened:
        """The network on a device. Raises ValueError for files that hold another model or other embeddings."""
        if self.checkpoint is None:
            from ..demo import embed_prompt, load_tiny

            network, vae = load_tiny()
            return Opened(self, network.to(device), lambda: vae.to(device), embed_prompt, FAMILIES["wan"])
        network, family, _ = open_network(self.checkpoint, device, walks=True)

        def vae() -> WanVAE:
            return self._open_vae(network, family, device)

        if family.walks:
            return Opened(self, network, vae, read_walk(self.embeddings, family, network.sizes), family)
        embeddings = read_embeddings(self.embeddings, network.sizes.text_dim)
        dtype = next(network.parameters()).dtype

        def embed(prompt: str) -> Tensor:
            return _chosen(embeddings, prompt).to(device, dtype)

        return Opened(self, network, vae, embed, family, embeddings)

    def _open_vae(self, network: nn.Module, family: Family, device: str) -> WanVAE:
        """Raises ValueError where there is none, or it is another model's."""
        if self.vae is None:
            raise ValueError("--start is read through the model's VAE, but there is no --vae. Give it, or leave out --start.")
        channels = network.sizes.channels
        if channels != CHANNELS:
            whose = f"the VAE of {KINDS[family.name].vae}" if family.name in KINDS else "another VAE"
            raise ValueError(f"{self.checkpoint.name} makes latents of {channels} channels, for {whose}, which is not part of this pack; "
                             f"that of Wan 2.1 has {CHANNELS}. Leave out --vae and give --out a {SUFFIX} file, of which VAE Decode in "
                             "ComfyUI makes the video.")
        return open_vae(self.vae, device)


@dataclass
class Opened:
    """An open model. vae: opens the VAE, which the first process alone needs. embed: from a prompt to a text embedding, or the inputs of a
    walk."""

    source: Source
    network: nn.Module
    vae: Callable[[], WanVAE]
    embed: Callable[[str], Tensor] | WalkInputs
    family: Family
    embeddings: Embeddings | None = None

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError for a prompt that is the number of no embedding."""
        for _, prompt in schedule.entries if self.embeddings is not None else ():
            if not _is_number(prompt, self.embeddings):
                count = len(self.embeddings.positive)
                raise ValueError(f"The prompt {prompt[:40]!r} is not the number of an embedding: {self.source.embeddings.name} holds "
                                 f"{count}. Give --prompt a number from 1 to {count}, or lines such as '0s: 1'.")


def _is_number(prompt: str, embeddings: Embeddings) -> bool:
    return prompt.isascii() and prompt.isdecimal() and len(prompt) < 10 and 1 <= int(prompt) <= len(embeddings.positive)


def _chosen(embeddings: Embeddings, prompt: str) -> Tensor:
    """The embedding [1, L, C] that a prompt names."""
    return embeddings.negative if prompt == NEGATIVE else embeddings.positive[int(prompt) - 1]

"""A video as its latents, in the file that ComfyUI's Load Latent opens: what VAE Decode makes pictures of.

The file is safetensors with `latent_tensor` [1, C, F, H, W] float32 in the scale of the VAE, and `latent_format_version_0`, an empty
tensor which says that nothing else scales them. It is written whole or not at all, each time with all frames so far.
Source: ComfyUI, nodes.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import read_safetensors, write_atomically
from ..models.latent_scale import to_vae
from .written import Written, chained_digest

SUFFIX = ".latent"
TENSOR, VERSION = "latent_tensor", "latent_format_version_0"


def holds_latents(out: Path) -> bool:
    """Whether a file of this name holds latents rather than pictures."""
    return out.suffix.lower() == SUFFIX


class LatentFrames:
    """Latents [1, C, f, H, W] as a network makes them -> frames [f, C, H, W] for a `LatentFile`. It has the methods of a `PixelFrames`."""

    def __call__(self, latents: Tensor) -> Tensor:
        return to_vae(latents.detach().to("cpu", torch.float32))[0].movedim(1, 0).contiguous()

    def state(self) -> dict[str, Tensor]:
        """Nothing: latents do not depend on those before them."""
        return {}

    def restore(self, state: Mapping[str, Tensor], shape: tuple[int, ...], frames: int) -> None:
        """Raises ValueError for the session of a video in pictures, whose latents are in no file."""
        if state:
            raise ValueError(f"The session is of a video in pictures, which a {SUFFIX} file cannot continue. Give the --out of the video.")


class LatentFile:
    """A target of a `VideoWriter`, whose frames are [C, H, W] float32."""

    # temporary files are named after `path` itself
    pattern = None

    def __init__(self, path: Path):
        self.path = self.tried = path

    def existing(self) -> Path | None:
        return self.path if self.path.exists() else None

    def create(self) -> None:
        """Nothing: the file appears with its first frames."""

    def discard(self) -> None:
        """Nothing: without frames there is no file."""

    def finish(self, written: Written) -> None:
        """Nothing: the file is whole after every flush."""

    def resume(self, frames: int, digest: str) -> Written:
        """Keep the first `frames` frames. Raises ValueError if they are not what was written before."""
        found = ""
        for frame in self._read(frames):
            found = chained_digest(found.encode(), frame.tobytes())
        if digest and found != digest:
            raise ValueError(f"{self.path} does not hold the {frames} latent frames that were written before. Put the file back, or start "
                             "over.")
        return Written(frames, 0, found)

    def append(self, frames: list[tuple[int, np.ndarray]], before: Written) -> Iterator[Written]:
        """Write the file anew with numbered frames behind those before; yields what is then on the disk."""
        new, digest = [frame for _, frame in frames], before.digest
        for frame in new:
            digest = chained_digest(digest.encode(), frame.tobytes())
        whole = torch.from_numpy(np.stack([*(self._read(before.frames) if before.frames else ()), *new], axis=1))[None]
        content = {TENSOR: whole.contiguous(), VERSION: torch.tensor([])}
        write_atomically(self.path, lambda place: save_file(content, place))
        yield Written(before.frames + len(new), 0, digest)

    def _read(self, frames: int) -> list[np.ndarray]:
        """The first `frames` frames of the file. Raises ValueError if it has fewer."""
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing, but {frames} latent frames were written to it before. Put it back, or start over.")
        held = read_safetensors(self.path)[0].get(TENSOR)
        if held is None or held.ndim != 5 or len(held) != 1 or held.dtype != torch.float32 or held.shape[2] < frames:
            raise ValueError(f"{self.path} is not the file to which {frames} latent frames were written before. Put that back, or start "
                             "over.")
        return [np.ascontiguousarray(frame) for frame in held[0].movedim(1, 0)[:frames].numpy()]

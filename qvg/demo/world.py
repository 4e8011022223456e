"""The tiny world model: HY-WorldPlay 5B's layout, made for procedural rooms, with a Wan VAE of its own; 6 MB together.

    world = TinyWorld(*load_tiny_world())
    rooms = random_rooms(1, torch.Generator().manual_seed(7))
    path = walk("right-14, left-14, still-3", PACE)
    made = world.walk(rooms, path, PRESETS["balanced"], memory="bank")
    pictures = world.pictures(made.latents)

The walk begins with a picture of the room, and the model invents everything outside it. Turning back to a wall therefore tests its memory:
it cannot know from anywhere else what was there. The files open in Load AR Video Model (QVG) and in ComfyUI's own VAELoader.
`benchmarks/train_world` made them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..measure.loop import Made, Progress, silent
from ..measure.walks import WalkLoop
from ..models.wan_vae import WanVAE, denormalize, normalize
from ..models.worldplay_wan import WorldWan
from ..settings import QVGSettings
from ..video.cameras import CameraPath
from ..video.view_memory import WORLDPLAY_5B, ViewMemory
from . import NETWORK_PATH, TEXT_DIM, VAE_PATH
from .world_scenes import WORLD_HEIGHT, WORLD_WIDTH, Rooms, render

WORLD_FILE, WORLD_VAE_FILE = "qvg_tiny_world.safetensors", "qvg_tiny_world_vae.safetensors"
WORLD_NETWORK_PATH, WORLD_VAE_PATH = NETWORK_PATH.with_name(WORLD_FILE), VAE_PATH.with_name(WORLD_VAE_FILE)
WORLD_LATENT = (WORLD_HEIGHT // 8, WORLD_WIDTH // 8)  # rows, columns of a latent frame
WORLD_GRID = (WORLD_HEIGHT // 16, WORLD_WIDTH // 16)  # rows, columns of tokens


def world_prompt() -> Tensor:
    """[1, 1, TEXT_DIM] float32: the only prompt that the model was trained on, because the start image says what a room looks like."""
    return torch.zeros(1, 1, TEXT_DIM)


def load_tiny_world(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[WorldWan, WanVAE]:
    """The network and the autoencoder on the CPU: those that ship, or those in a folder that the training wrote.

    Raises FileNotFoundError if one is missing.
    """
    from safetensors.torch import load_file

    network, vae = (WORLD_NETWORK_PATH, WORLD_VAE_PATH) if folder is None else (Path(folder) / WORLD_FILE, Path(folder) / WORLD_VAE_FILE)
    for path in (network, vae):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; train the tiny world model with benchmarks/train_world, which writes it.")
    return WorldWan.from_state_dict(load_file(network), dtype), WanVAE.from_state_dict(load_file(vae), dtype)


class TinyWorld:
    """A network and an autoencoder to walk with. All rooms of a batch are walked along one path."""

    def __init__(self, network: WorldWan, vae: WanVAE, device="cpu"):
        self.network, self.vae, self.device = network.to(device), vae.to(device), torch.device(device)
        with torch.no_grad():
            self.prompt = network.project_context(world_prompt().to(self.device))

    @torch.no_grad()
    def start(self, rooms: Rooms, path: CameraPath) -> Tensor:
        """Latents [B, 16, 1, h, w] of what the first camera sees."""
        first = path.cameras[:1].expand(len(rooms), 1, 4, 4)
        return normalize(self.vae.encode(render(rooms, first).to(self.device)))

    def walk(self, rooms: Rooms, path: CameraPath, settings: QVGSettings, *, memory: str = "bank", views: ViewMemory = WORLDPLAY_5B,
             seed: int = 0, progress: Progress = silent) -> Made:
        """Walk along the whole path from a picture of each room; see `measure.walks.WalkLoop.make`."""
        loop = WalkLoop(self.network, self.prompt, (len(rooms), self.network.sizes.channels, *WORLD_LATENT), self.device)
        return loop.make(path, self.start(rooms, path), settings, memory=memory, views=views, seed=seed, progress=progress)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 16, F, h, w] to [B, 3, 4F - 3, H, W] in -1..1."""
        return torch.cat(list(self.vae.decode_frames(denormalize(latents.to(self.device)))), dim=2).clamp(-1, 1)

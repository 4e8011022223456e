"""Train the tiny world model from scratch, in minutes on one GPU, and inspect it.

    python -m comfyui_qvg.benchmarks.train_world --out DIR

writes the two weight files and contact sheets, and prints losses and how well what comes into view again is remembered. The autoencoder
begins as that of the tiny causal model, which never saw a camera turn. `--resume DIR` starts from weight files; a stage of 0 minutes is
skipped. On a CPU, `--toy` runs every stage for seconds as a check.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...qvg.demo import TEXT_DIM, VAE_PATH
from ...qvg.demo.world import WORLD_FILE, WORLD_GRID, WORLD_VAE_FILE, TinyWorld, world_prompt
from ...qvg.demo.world_scenes import PACE, random_rooms, render
from ...qvg.models.wan_vae import CHANNELS, WanVAE
from ...qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from ...qvg.settings import PRESETS
from ...qvg.video.camera_moves import walk
from ...qvg.video.cameras import video_cameras
from ...qvg.video.view_memory import ViewMemory
from ..train_demo.__main__ import contact_sheet, psnr, save, write_weights
from ..train_demo.autoencoder import EDGE_WEIGHT, Stage, fold_statistics, unfold_statistics
from ..world import LOOK_AROUND, remembered
from .diffusion import Trainer, initialize
from .walks import RoomScenes, Walks, encode_pool, kept_walks

WIDTH, LAYERS, FFN, FREQUENCIES = 128, 7, 384, 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder with weight files to start from")
    parser.add_argument("--walks", type=Path, help="file to keep the camera paths in, whose frames take a while to choose")
    parser.add_argument("--paths", type=int, default=192)
    parser.add_argument("--vae-minutes", type=float, default=1.2)
    parser.add_argument("--pool-minutes", type=float, default=0.3)
    parser.add_argument("--dit-minutes", type=float, default=2.3, help="on the true context")
    parser.add_argument("--own-minutes", type=float, default=0.8, help="on the model's own context")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ffn", type=int, default=FFN)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train_autoencoder(vae: WanVAE, scenes: RoomScenes, minutes: float, batch: int, frames: int) -> None:
    """Train a trained autoencoder on rooms."""
    unfold_statistics(vae)
    vae.requires_grad_(True).train()
    Stage(vae, scenes, batch, frames, EDGE_WEIGHT).train("vae", minutes, 2e-3)
    vae.eval()


@torch.no_grad()
def look_at_autoencoder(vae: WanVAE, walks: Walks, out: Path, device, frames: int) -> None:
    video = RoomScenes(walks, 6, 11, device).draw(6, frames)
    output = torch.cat(list(vae.decode_frames(vae.encode(video))), dim=2)
    print(f"vae: {psnr(output, video).mean():.2f} dB on unseen rooms", flush=True)
    contact_sheet(torch.stack([video, output], 1).flatten(0, 1), out / "vae.png", 9)


@torch.no_grad()
def look_at_network(world: TinyWorld, out: Path, toy: bool) -> None:
    """Rooms drawn exactly and made with what memory there is, one row each, and how far views agree with the first of the same camera."""
    rooms = random_rooms(1 if toy else 4, torch.Generator().manual_seed(21)).to(world.device)
    path = walk("right-5, left-5, still-1" if toy else LOOK_AROUND, PACE)
    shown = [render(rooms, video_cameras(path.cameras).expand(len(rooms), -1, -1, -1))]
    for memory, views in (("rebuild", ViewMemory(12, 0, 4)), ("bank", ViewMemory(8, 0, 4)), ("rebuild", ViewMemory(4, 0, 0))):
        pictures = world.pictures(world.walk(rooms, path, PRESETS["off"], memory=memory, views=views, seed=1).latents)
        found = {name: round(float(value.mean()), 2) for name, value in remembered(pictures, shown[0], path).items()}
        print(f"{memory} {views}: {found}", flush=True)
        shown.append(pictures)
    for number in range(len(rooms)):
        contact_sheet(torch.stack([video[number].cpu() for video in shown]), out / f"walk{number}.png", 16)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    device, toy = torch.device(options.device), options.toy
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    walks = kept_walks(2 if toy else options.paths, options.walks)
    print(f"{len(walks)} paths", flush=True)

    vae = WanVAE.from_state_dict(load_file(VAE_PATH), torch.float32).to(device)
    network = WorldWan(WorldWanSizes(WIDTH, options.ffn, options.layers, TEXT_DIM, CHANNELS, FREQUENCIES))
    initialize(network)
    network.to(device)
    if options.resume:
        for module, name in ((vae, WORLD_VAE_FILE), (network, WORLD_FILE)):
            if (options.resume / name).exists():
                module.load_state_dict(load_file(options.resume / name))

    if options.vae_minutes:
        scenes = RoomScenes(walks, 2 if toy else 1024, 1, device, 5 if toy else 37)
        train_autoencoder(vae, scenes, options.vae_minutes, 1 if toy else 4, 5 if toy else 21)
        fold_statistics(vae, scenes, 1 if toy else 16, 5 if toy else 37)
    total = save(vae, options.out / WORLD_VAE_FILE)
    vae.requires_grad_(False)
    look_at_autoencoder(vae, walks, options.out, device, 5 if toy else 37)
    if not options.dit_minutes and not options.own_minutes:
        return

    pool = encode_pool(vae, walks, options.pool_minutes, device, *((1, 1) if toy else ()))
    std, mean = torch.std_mean(pool.latents.float(), dim=(0, 2, 3, 4))
    print(f"pool: {len(pool.latents)} rooms; channel means to {mean.abs().max():.3f}, deviations {std.min():.3f} to {std.max():.3f}",
          flush=True)
    trainer = Trainer(network, world_prompt().to(device), WORLD_GRID, pool, walks, device)
    batch, stages = 1 if toy else options.batch, [("true", options.dit_minutes, options.rate, False)]
    stages.append(("own", options.own_minutes, options.rate / 2, True))
    for name, minutes, rate, own in stages:
        if minutes:
            trainer.train(minutes, batch, rate, own, name, partial(write_weights, path=options.out / WORLD_FILE))
            written = save(network, options.out / WORLD_FILE)
    print(f"weights: {total + written} bytes", flush=True)
    network = WorldWan.from_state_dict(load_file(options.out / WORLD_FILE, str(device)), torch.float32)
    look_at_network(TinyWorld(network, vae, device), options.out, toy)


if __name__ == "__main__":
    main()

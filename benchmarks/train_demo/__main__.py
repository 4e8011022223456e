"""Train the tiny model from scratch, in minutes on one GPU, and inspect it.

    python -m comfyui_qvg.benchmarks.train_demo --out DIR

writes the two weight files and contact sheets (one row per prompt, eight frames of the video) from text and from start images, and prints
losses and the PSNR of a video continued from a still. `--resume DIR` starts from weight files; a stage of 0 minutes is skipped. On a CPU,
`--toy` runs every stage for seconds as a check.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...qvg.demo import METADATA, NETWORK_FILE, PROMPTS, TEXT_DIM, VAE_FILE, embed_prompt
from ...qvg.demo.prompts import embed_scene
from ...qvg.demo.scenes import place, random_scene, render
from ...qvg.models.wan import CausalWan, WanSizes
from ...qvg.models.wan_vae import WanVAE, denormalize, normalize
from .autoencoder import Scenes, fold_statistics, train_autoencoder
from .clock import Clock
from .diffusion import Pool, Trainer
from .rollout import generate

LAYERS, WIDTH, FFN = 6, 256, 1024
BYTES_LIMIT = 16_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder with weight files to start from")
    parser.add_argument("--vae-minutes", type=float, default=4.5)
    parser.add_argument("--pool-minutes", type=float, default=0.7)
    parser.add_argument("--dit-minutes", type=float, default=6.0, help="teacher forcing")
    parser.add_argument("--own-minutes", type=float, default=3.0, help="on the model's own context")
    parser.add_argument("--vae-base", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ffn", type=int, default=FFN)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def write_weights(weights: dict[str, Tensor], path: Path, metadata: dict | None = None) -> dict[str, Tensor]:
    """Write weights in bf16; returns them as they were written."""
    weights = {key: value.to("cpu", torch.bfloat16).contiguous() for key, value in weights.items()}
    save_file(weights, path, {"format": "pt", **(metadata or {})})
    return weights


def save(module: torch.nn.Module, path: Path, metadata: dict | None = None) -> int:
    """Write bf16 weights and round the module to them, in place, so that the saved weights are the ones inspected."""
    module.load_state_dict(write_weights(module.state_dict(), path, metadata))
    return path.stat().st_size


@torch.no_grad()
def encode_pools(vae: WanVAE, minutes: float, frames: int, beginning: int, device) -> dict[str, Pool]:
    """As many clips as the minutes allow: for text, which begin where a description puts them; for start images; and for
    text, but only the beginnings, of which more are seen because they are all that the description decides alone."""
    generator = torch.Generator().manual_seed(3)
    pools = {}
    for kind, share, length in (("text", 0.3, frames), ("image", 0.3, frames), ("short", 0.4, beginning)):
        clock, parts = Clock(minutes * share), []
        while not (parts and clock.over()):
            scenes = [random_scene(generator) for _ in range(16)]
            video = render(place(scenes, generator, free=kind == "image").to(device), 4 * length - 3)
            with torch.autocast(device.type, torch.bfloat16):
                latents = normalize(vae.encode(video).float()).bfloat16()
            parts.append((latents, torch.cat([embed_scene(scene) for scene in scenes]).to(device)))
        pools[kind] = tuple(map(torch.cat, zip(*parts)))
    return pools


def contact_sheet(video: Tensor, path: Path, moments: int = 8) -> None:
    """[B, 3, F, H, W] in -1..1 -> a PNG with one row per video."""
    index = torch.linspace(0, video.shape[2] - 1, moments).round().long()
    picture = ((video[:, :, index].float().cpu() + 1) * 127.5).clamp(0, 255).byte()
    rows, _, columns, height, width = picture.shape
    picture = picture.permute(0, 3, 2, 4, 1).reshape(rows * height, columns * width, 3)
    Image.fromarray(picture.numpy()).save(path)


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    return torch.cat(list(vae.decode_frames(denormalize(latents))), dim=2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of each frame, mean over [B, 3, F, H, W] in -1..1 -> [F]."""
    return -10 * ((a - b).clamp(-2, 2) / 2).square().mean(dim=(0, 1, 3, 4)).log10()


@torch.no_grad()
def look_at_autoencoder(vae: WanVAE, out: Path, device, frames: int) -> None:
    video = Scenes(6, 11, device).draw(6, frames)
    output = torch.cat(list(vae.decode_frames(vae.encode(video))), dim=2)
    print(f"vae: {psnr(output, video).mean():.2f} dB on unseen clips", flush=True)
    contact_sheet(torch.stack([video, output], 1).flatten(0, 1), out / "vae.png", 6)


@torch.no_grad()
def look_at_network(network: CausalWan, vae: WanVAE, out: Path, device, frames: int) -> None:
    prompts = torch.cat([embed_prompt(prompt) for prompt in PROMPTS[:8]]).to(device)
    contact_sheet(decode(vae, generate(network, prompts, frames)), out / "text.png")

    generator = torch.Generator().manual_seed(12)
    scenes = [random_scene(generator) for _ in range(8)]
    video = render(place(scenes, generator).to(device), 4 * frames - 3)
    prompts = torch.cat([embed_scene(scene) for scene in scenes]).to(device)
    start = normalize(vae.encode(video[:, :, :1]))
    continued = decode(vae, generate(network, prompts, frames, start=start))
    curve = psnr(continued, video)
    marks = [min(mark, len(curve) - 1) for mark in (0, 12, 24, 48, 80, 160, 240)]
    print("image: dB against the truth at frame", {mark: round(float(curve[mark]), 1) for mark in marks}, flush=True)
    contact_sheet(torch.stack([video, continued], 1).flatten(0, 1)[:8], out / "image.png")


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    short, long, seen = (6, 6, 6) if options.toy else (12, 30, 63)

    vae = WanVAE(options.vae_base).to(device)
    network = CausalWan(WanSizes(WIDTH, options.ffn, options.layers, TEXT_DIM)).to(device)
    if options.resume:
        for module, name in ((vae, VAE_FILE), (network, NETWORK_FILE)):
            if (options.resume / name).exists():
                module.load_state_dict(load_file(options.resume / name))

    if options.vae_minutes:
        train_autoencoder(vae, options.vae_minutes, device, options.toy, bool(options.resume))
        rounds = 2 if options.toy else 16
        fold_statistics(vae, Scenes(4 * rounds, 2, device), rounds, 5 if options.toy else 29)
    total = save(vae, options.out / VAE_FILE)
    vae.requires_grad_(False)
    look_at_autoencoder(vae, options.out, device, 9 if options.toy else 101)

    if not options.dit_minutes and not options.own_minutes:
        return
    pools = encode_pools(vae, options.pool_minutes, long, 6, device)
    latents = pools["text"][0]
    std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3, 4))
    print(f"pools: {', '.join(f'{len(pool[0])} for {kind}' for kind, pool in pools.items())}; channel means to {mean.abs().max():.3f}, "
          f"deviations {std.min():.3f} to {std.max():.3f}", flush=True)

    trainer = Trainer(network, pools, device, fast=device.type == "cuda" and not options.no_compile)
    batch = 2 if options.toy else options.batch
    stages = [("teacher", options.dit_minutes, batch, short, options.rate, False),
              ("own", options.own_minutes, max(batch // 4, 1), long, options.rate / 2, True)]
    for name, minutes, size, frames, rate, own in stages:
        if minutes:
            trainer.train(minutes, size, frames, rate, own, name)
            save(network, options.out / NETWORK_FILE, METADATA)
    total += save(network, options.out / NETWORK_FILE, METADATA)
    print(f"weights: {total} bytes of {BYTES_LIMIT} allowed", flush=True)
    network = CausalWan.from_state_dict(load_file(options.out / NETWORK_FILE, str(device)), torch.float32)
    look_at_network(network, vae, options.out, device, seen)


if __name__ == "__main__":
    main()

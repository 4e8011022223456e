"""The `qvg` command: the same ideas without ComfyUI.

    qvg demo
    qvg plan --model self-forcing --seconds 30 --vram 24
    qvg generate --prompt "red circle moving right, over green dots still" --seconds 30 --out ball.mp4
    qvg bench kernels
    qvg info
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys

import torch

from . import dispatch, generate
from . import plan as planning
from .demo import run as demonstration
from .models.catalogue import MODELS
from .models.weights import WEIGHTS
from .settings import PRESETS

DEFAULT_SECONDS = 30.0
BENCHMARKS = ("kernels", "generate", "quality")


def _plan(arguments) -> None:
    if arguments.weights and not (arguments.card or arguments.cards):
        raise ValueError("--weights says what is left of a card for the cache; give --card or --cards with it.")
    weights = arguments.weights or ("bf16" if arguments.card else "")
    if arguments.cards:
        print(planning.render_cards(arguments.model, weights=weights or "bf16"))
        return
    if arguments.card:
        arguments.vram = planning.room_beside(arguments.model, arguments.card, weights)
    if arguments.seconds is None and arguments.latent_frames is None:
        arguments.seconds = DEFAULT_SECONDS
    result = planning.plan(
        arguments.model, width=arguments.width, height=arguments.height, seconds=arguments.seconds or 0,
        latent_frames=arguments.latent_frames or 0, preset=arguments.preset or "", vram_gib=arguments.vram,
        offload=arguments.offload, weights=weights)
    print(planning.to_json(result) if arguments.json else planning.render(result, arguments.vram))


def _info(arguments) -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} {platform.system()}")
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    names = {"mps": "Apple GPU", "cpu": "none, torch on the CPU"}
    print("accelerator: " + (names.get(name) or torch.cuda.get_device_name()))
    for op, backend, reason in dispatch.report(name):
        print(f"{op:8}{backend:8}{dispatch.OPS[op]}" + (f"; not triton: {reason}" if reason else ""))


def _bench(arguments) -> None:
    package = f"{__package__.rpartition('.')[0]}.benchmarks"
    if importlib.util.find_spec(package) is None:
        raise ValueError("The benchmarks are not part of an installed pack; clone the repository and run `qvg bench` from there.")
    importlib.import_module(f"{package}.{arguments.name}").main(arguments.options)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="qvg", description="A KV cache of about two bits a number for autoregressive video models.")
    commands = root.add_subparsers(required=True)

    command = commands.add_parser("demo", help="one video with a bf16 and a quantized cache, side by side")
    demonstration.add_arguments(command)
    command.set_defaults(run=demonstration.main)

    command = commands.add_parser("plan", help="what a model, size and length will need")
    command.add_argument("--model", required=True, choices=MODELS)
    command.add_argument("--width", type=int, default=0, help="pixels; the model's usual size where left out")
    command.add_argument("--height", type=int, default=0)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help=f"length of the video; {DEFAULT_SECONDS:g} where no length is given")
    length.add_argument("--latent-frames", type=int)
    length.add_argument("--cards", action="store_true", help="the longest videos on cards of 8 to 80 GiB")
    command.add_argument("--preset", choices=PRESETS)
    memory = command.add_mutually_exclusive_group()
    memory.add_argument("--vram", type=float, default=0, metavar="GIB", help="say what fits into this much, model weights not counted")
    memory.add_argument("--card", type=float, default=0, metavar="GIB", help="say what fits on a card of this size, beside the weights")
    command.add_argument("--weights", metavar="TYPE", help=f"of --card and --cards: {', '.join(WEIGHTS)}; bf16 where left out")
    command.add_argument("--offload", action="store_true", help="of spans that wait in host memory and visit the device a layer at a time")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_plan)

    command = commands.add_parser("generate", help="make a long video with the tiny model")
    generate.add_arguments(command)
    command.set_defaults(run=generate.main)

    command = commands.add_parser("bench", help="measure speed, memory and quality", add_help=False)
    command.add_argument("name", choices=BENCHMARKS)
    command.add_argument("options", nargs=argparse.REMAINDER)
    command.set_defaults(run=_bench)

    command = commands.add_parser("info", help="versions and backends")
    command.set_defaults(run=_info)
    return root


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"qvg: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

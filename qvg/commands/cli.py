"""The `qvg` command: the same ideas without ComfyUI.

    qvg demo
    qvg plan --model self-forcing --seconds 30 --vram 24
    qvg generate --prompt "red circle moving right, over green dots still" --seconds 30 --out ball.mp4
    qvg bench kernels
    qvg info

It ends with 0 when what was asked for is done, 1 where that failed on the way (a full disk, no memory), 2 where it was refused before it
began, and 130 where Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys

import torch

from ..backends import dispatch
from ..models.catalogue import MODELS
from ..models.weights import WEIGHTS
from ..report import plan as planning
from ..settings import PRESETS
from ..video import MAX_FRAMES
from . import demo, generate
from .arguments import DAY, MOST_GIB, number, whole

DEFAULT_SECONDS = 30.0
BENCHMARKS = ("kernels", "generate", "quality")


DONE, FAILED, REFUSED = 0, 1, 2


class Parser(argparse.ArgumentParser):
    """Options are written out, so that no slip of the finger asks for another one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)


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
    package = f"{__package__.rpartition('.qvg.')[0]}.benchmarks"
    if importlib.util.find_spec(package) is None:
        raise ValueError("The benchmarks are not part of an installed pack; clone the repository and run `qvg bench` from there.")
    importlib.import_module(f"{package}.{arguments.name}").main(arguments.options)


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="qvg", description="A KV cache of about two bits per element for autoregressive video models.")
    commands = root.add_subparsers(required=True)

    command = commands.add_parser("demo", help="one video with a bf16 and a quantized cache, side by side")
    demo.add_arguments(command)
    command.set_defaults(run=demo.main)

    command = commands.add_parser("plan", help="what a model, size and length will need")
    command.add_argument("--model", required=True, choices=MODELS)
    command.add_argument("--width", type=whole(16, 16384), default=0, help="pixels; the model's usual size where left out")
    command.add_argument("--height", type=whole(16, 16384), default=0)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=number(above=0, most=DAY),
                        help=f"length of the video; {DEFAULT_SECONDS:g} where no length is given")
    length.add_argument("--latent-frames", type=whole(1, MAX_FRAMES))
    length.add_argument("--cards", action="store_true", help="the longest videos on cards of 8 to 80 GiB")
    command.add_argument("--preset", choices=PRESETS)
    memory = command.add_mutually_exclusive_group()
    memory.add_argument("--vram", type=number(above=0, most=MOST_GIB), default=0, metavar="GIB",
                        help="say what fits into this much, model weights not counted")
    memory.add_argument("--card", type=number(above=0, most=MOST_GIB), default=0, metavar="GIB",
                        help="say what fits on a card of this size, beside the weights")
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
    try:
        chosen = parser().parse_args(arguments)
        code = chosen.run(chosen) or DONE
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return _end(error, REFUSED)
    except BrokenPipeError:
        # who reads the output has enough of it; nothing else may be written there, not even at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _end("Interrupted.", generate.INTERRUPTED)
    except OSError as error:
        return _end(error, FAILED)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _end(f"There is not enough memory ({str(error).splitlines()[0] if str(error) else 'on this machine'}). Ask for a shorter or "
                    "smaller video, or set a --budget.", FAILED)


def _end(sentence, code: int) -> int:
    print(f"qvg: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

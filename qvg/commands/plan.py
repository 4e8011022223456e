"""`qvg plan` as a command: what a model, a size and a length need at every preset, and what fits on a card.

    qvg plan --model self-forcing --seconds 30 --vram 24
    qvg plan --model krea-14b --weights fp8 --card 24
    qvg plan --model self-forcing --cards
    qvg plan --model hy-worldplay-8b --seconds 40 --weights fp8 --card 24       all memories of a world model, or one with --memory
"""

from __future__ import annotations

from ..models.catalogue import MODELS
from ..models.weights import WEIGHTS
from ..report import plan as planning
from ..settings import PRESETS
from ..video import MAX_FRAMES
from .arguments import DAY, MOST_GIB, number, whole

DEFAULT_SECONDS = 30.0


def add_arguments(command) -> None:
    command.add_argument("--model", required=True, choices=MODELS)
    command.add_argument("--width", type=whole(16, 16384), default=0, help="pixels (default: the model's usual size)")
    command.add_argument("--height", type=whole(16, 16384), default=0)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=number(above=0, most=DAY), help=f"length of the video (default {DEFAULT_SECONDS:g})")
    length.add_argument("--latent-frames", type=whole(1, MAX_FRAMES))
    length.add_argument("--cards", action="store_true", help="the longest videos on cards of 8 to 80 GiB")
    command.add_argument("--preset", choices=PRESETS)
    memory = command.add_mutually_exclusive_group()
    memory.add_argument("--vram", type=number(above=0, most=MOST_GIB), default=0, metavar="GIB",
                        help="what fits into this much memory, model weights not counted")
    memory.add_argument("--card", type=number(above=0, most=MOST_GIB), default=0, metavar="GIB",
                        help="what fits on a card of this size beside the weights")
    command.add_argument("--weights", metavar="TYPE", help=f"for --card and --cards: {', '.join(WEIGHTS)} (default bf16)")
    command.add_argument("--memory", choices=planning.MEMORIES, help="of a world model (default: all)")
    command.add_argument("--gpus", type=whole(1, 1024), default=1, help="that make the video together; figures are of each (default 1)")
    command.add_argument("--offload", action="store_true", help="keep the cache in host memory, on the device one layer at a time")
    command.add_argument("--json", action="store_true")


def main(arguments) -> None:
    """Raises ValueError for options that contradict each other, and for a card that the weights fill."""
    if arguments.weights and not (arguments.card or arguments.cards):
        raise ValueError("--weights is subtracted from a card; give --card or --cards with it.")
    weights = arguments.weights or ("bf16" if arguments.card else "")
    if arguments.cards and arguments.gpus > 1:
        raise ValueError("--cards is of one GPU; give --card with --gpus instead.")
    if arguments.cards:
        print(planning.render_cards(arguments.model, weights=weights or "bf16"))
        return
    memory = planning.left_for_cache(arguments.model, arguments.card, weights, required=True) if arguments.card else arguments.vram
    seconds = arguments.seconds or (0 if arguments.latent_frames else DEFAULT_SECONDS)
    memories = [arguments.memory or ""]
    if MODELS[arguments.model].context_frames and not arguments.memory:
        memories = list(planning.MEMORIES)
    results = {name: planning.plan(
        arguments.model, size=(arguments.width, arguments.height), seconds=seconds, latent_frames=arguments.latent_frames or 0,
        preset=arguments.preset or "", vram_gib=memory, offload=arguments.offload, weights=weights, memory=name,
        gpus=arguments.gpus) for name in memories}
    if arguments.json:
        print(planning.to_json({"memories": results} if len(results) > 1 else next(iter(results.values()))))
        return
    print("\n\n".join(planning.render(result, memory) for result in results.values()))

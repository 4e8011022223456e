"""The `qvg` command: what the pack does, without ComfyUI.

    qvg demo
    qvg plan --model self-forcing --seconds 30 --vram 24
    qvg generate --prompt "red circle moving right, over green dots still" --seconds 30 --out ball.mp4
    qvg bench kernels
    qvg info

Exit status: 0 when the command succeeded, 1 when it failed while running (disk full, out of memory), 2 when it was refused before it
started, 130 when Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ..video.ranks import RankEnded
from . import bench, demo, generate, info, plan

# name -> (module with add_arguments and main, help)
COMMANDS = {
    "demo": (demo, "one video with a bf16 and a quantized cache, side by side"),
    "plan": (plan, "memory that a model, a size and a length need"),
    "generate": (generate, "make a long video with the tiny model or a checkpoint"),
    "bench": (bench, "measure speed, memory and quality"),
    "info": (info, "versions and backends"),
}
DONE, FAILED, REFUSED = 0, 1, 2


class Parser(argparse.ArgumentParser):
    """Takes options only in full, so that a typo never selects another option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="qvg", description="A KV cache of one or two bits per element for autoregressive video models.")
    commands = root.add_subparsers(required=True)
    for name, (module, text) in COMMANDS.items():
        # the benchmarks have help of their own
        command = commands.add_parser(name, help=text, add_help=module is not bench)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the process's exit status."""
    try:
        parsed = parser().parse_args(arguments)
        code = parsed.run(parsed) or DONE
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return _end(error, REFUSED)
    except BrokenPipeError:
        # the reader closed the pipe; nothing more may be written to it, not even when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _end("Interrupted.", generate.INTERRUPTED)
    except (OSError, RankEnded) as error:
        return _end(error, FAILED)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _end(f"There is not enough memory ({str(error).splitlines()[0] if str(error) else 'on this machine'}). Ask for a shorter or "
                    "smaller video, or set a --budget.", FAILED)


def _end(sentence, code: int) -> int:
    print(f"qvg: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

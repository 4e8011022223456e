"""Files that somebody else made, by the thousand: each opens right, or is refused with a sentence, in seconds and without much memory.

    python tests/fuzz.py sessions 0 2000
    python tests/fuzz.py checkpoints 0 2000

A seed is a file: a good one that is changed where its structure is (fields, tensors, types, shapes, values, layers, containers, bytes),
after which its checksums are made to agree again, for most. Every failure is printed with its seed, and the exit status is then 1.
`fuzz_sessions` and `fuzz_checkpoints` make and open the files. Linux only: it reads the process's peak memory.
"""

from __future__ import annotations

import faulthandler
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

MEBI = 1 << 20
MOST_MEMORY = 96 * MEBI  # beyond what the process has; the files have at most two of them
MOST_SECONDS = 5.0  # of computing, so that a busy machine fails nothing
HUNG = 60.0
SENTENCE = re.compile(r"[^\n]{10,700}\.")


def peak() -> tuple[int, int]:
    """Most resident memory since `forget_peak`, and resident memory now, in bytes."""
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file)
    return tuple(1024 * int(found[name].split()[0]) for name in ("VmHWM", "VmRSS"))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def refusal(error: Exception) -> str:
    """What is wrong with a refusal, "" for a good one: an error of the pack's own kind, with one sentence or two."""
    if type(error).__name__ not in ("SessionError", "ValueError", "PlaceError", "Taken", "InUse"):
        return f"{type(error).__name__}: {error}"
    return "" if SENTENCE.fullmatch(str(error)) else f"no sentence: {error}"


def attempt(seed: int, make, use) -> str:
    """Make a file, use it, and say what went wrong; "" if nothing did. `use` returns what is wrong, "" if nothing is."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    made = make(draw)
    forget_peak()
    before, began = peak()[1], time.process_time()
    try:
        wrong = use(made, draw)
    except Exception as error:
        wrong = refusal(error)
        if wrong:
            wrong += "".join(traceback.format_exception(error)[-6:])
    seconds, grown = time.process_time() - began, peak()[0] - before
    if not wrong and grown > MOST_MEMORY:
        wrong = f"{grown / MEBI:.0f} MiB more memory"
    if not wrong and seconds > MOST_SECONDS:
        wrong = f"{seconds:.1f} s"
    return wrong


def main(what: str, first: int, stop: int) -> int:
    if what == "sessions":
        from fuzz_sessions import Sessions as Files
    else:
        from fuzz_checkpoints import Checkpoints as Files
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failures, opened, began = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        for seed in range(first, stop):
            faulthandler.dump_traceback_later(HUNG, exit=True)
            files.seed, files.opened = seed, False
            wrong = attempt(seed, files.make, files.use)
            opened += files.opened
            if wrong:
                failures += 1
                print(f"{what} seed {seed} ({files.story}): {wrong}", flush=True)
        faulthandler.cancel_dump_traceback_later()
    count = stop - first
    print(f"{count} {what}: {opened} opened, {count - opened - failures} refused, {failures} failures, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

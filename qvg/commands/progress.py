"""A progress bar of tqdm on a terminal, which also tells of kernels that are being compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import backends


class Bar:
    """What a piece of work shows. Into a file it writes its sentences and, at the end, one line."""

    def __init__(self, title: str, unit: str):
        self.title, self.began = title, time.perf_counter()
        # unlike tqdm's own test of the stream, this one can be asked for at any time
        self.live = sys.stderr.isatty()
        self.line = tqdm(desc=title, unit=unit, disable=not self.live, leave=False, file=sys.stderr, dynamic_ncols=True)

    def show(self, done: int, of_all: int, text: str = "") -> None:
        """That so much is done; text: what stands behind it."""
        if self.line.total is None:
            # what was done before is no measure of speed
            self.line.initial = done - 1
        self.line.total, self.line.n = of_all, done
        self.line.set_postfix_str(text)

    def compiling(self, text: str) -> None:
        if self.live:
            self.line.set_postfix_str(text)
        elif text:
            self.say(text)

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self.line.clear()
        print(sentence, file=sys.stderr, flush=True)
        self.line.refresh()

    def close(self) -> None:
        self.line.close()


@contextmanager
def bar(title: str, unit: str = "pass") -> Iterator[Bar]:
    """A bar for the time of the block; at the end, the seconds that it took as a line."""
    shown = Bar(title, unit)
    try:
        with backends.on_compile(shown.compiling):
            yield shown
    finally:
        shown.close()
    print(f"{title:<22}{time.perf_counter() - shown.began:.1f} s", file=sys.stderr, flush=True)

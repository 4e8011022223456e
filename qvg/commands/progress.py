"""A tqdm progress bar, which also names kernels that are being compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import backends


class Bar:
    """The progress of one task. If stderr is not a terminal, only sentences and a final line are written."""

    def __init__(self, title: str, unit: str):
        self.title, self.began = title, time.perf_counter()
        # tqdm tests the stream only once, when the bar is made
        self.live = sys.stderr.isatty()
        self.line = tqdm(desc=title, unit=unit, disable=not self.live, leave=False, file=sys.stderr, dynamic_ncols=True)

    def show(self, done: int, of_all: int, text: str = "") -> None:
        """Set the progress. text: shown after the bar."""
        if self.line.total is None:
            # steps of an earlier run must not count for the speed
            self.line.initial = done - 1
        self.line.total, self.line.n = of_all, done
        self.line.set_postfix_str(text)

    def compiling(self, text: str) -> None:
        if self.live:
            self.line.set_postfix_str(text)
        elif text:
            self.say(text)

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.line.clear()
        print(sentence, file=sys.stderr, flush=True)
        self.line.refresh()

    def close(self) -> None:
        self.line.close()


@contextmanager
def bar(title: str, unit: str = "pass") -> Iterator[Bar]:
    """A bar for the duration of the block; afterwards a line with the seconds it took."""
    shown = Bar(title, unit)
    try:
        with backends.on_compile(shown.compiling):
            yield shown
    finally:
        shown.close()
    print(f"{title:<22}{time.perf_counter() - shown.began:.1f} s", file=sys.stderr, flush=True)

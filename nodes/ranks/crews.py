"""The processes of the other GPUs in this ComfyUI: of one split at a time, because all would share the same GPUs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy.model_management import get_torch_device

from ...qvg.video.crew import Crew
from .mark import Split

STARTING = "starting the processes of the other GPUs..."


class Crews:
    """Starts a crew for the first run that needs one, and ends it when another is needed, when ComfyUI unloads the model, and when it has
    no MODEL with a mark any more, not in a graph that it remembers either."""

    def __init__(self):
        self._crew: Crew | None = None
        self._wanted: tuple = ()
        self._marks: weakref.WeakSet[Split] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._users, self._unloaded = 0, False

    def register(self, split: Split) -> None:
        """Keep processes for this mark as long as it exists."""
        self._marks.add(split)
        weakref.finalize(split, self._forgotten).atexit = False

    def _forgotten(self) -> None:
        # the set still counts the mark that is going
        if not list(self._marks):
            self.unloaded()

    def unloaded(self, patcher=None, unpatch_all: bool = True) -> None:
        """ComfyUI unloads the model. A callback of ON_DETACH, which is also called when one clone takes another's place."""
        if unpatch_all:
            self._unloaded = True
            if not self._users:
                self.stop()

    def stop(self) -> None:
        with self._lock:
            crew, self._crew = self._crew, None
            if crew is not None:
                crew.stop()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, there are ranks for the next run although ComfyUI unloads the model, as it may between two segments."""
        with self._lock:
            self._users, self._unloaded = self._users + 1, False
            try:
                yield
            finally:
                self._users -= 1
                # during the run the ranks were needed; a stopped crew is dropped, too
                if not self._users and (self._unloaded or self._crew is None or self._crew.stopped):
                    self.stop()

    @contextmanager
    def use(self, split: Split, device: torch.device, say) -> Iterator[Crew]:
        """The crew of a split. say: shows a line of text."""
        with self.kept():
            yield self._of(split, device, say)

    def _of(self, split: Split, device: torch.device, say) -> Crew:
        wanted = split.gpus, split.cluster, str(device)
        if self._crew is None or self._crew.stopped or self._wanted != wanted:
            self.stop()
            say(STARTING)
            self._crew, self._wanted = Crew(split.gpus, str(device), split.cluster), wanted
        return self._crew


CREWS = Crews()


def most_gpus() -> int:
    """GPUs that this ComfyUI can see."""
    return torch.cuda.device_count() if get_torch_device().type == "cuda" else 0

"""Let ComfyUI start where torch is a CPU build but torchvision and torchaudio are PyPI's CUDA wheels.

PyPI's torchvision and torchaudio for Linux are linked against CUDA libraries that a CPU torch does not bring. Their
Python code runs without the compiled part, except at two moments of the import:

- torchvision registers a fake `torchvision::nms`, an operator that only its library would have declared. Here its
  schema is declared first, so the registration finds it. Transforms work; calling `nms` itself says that there is
  no kernel.
- torchaudio loads every library it finds beside it and lets the failure through. Here it is told that there is
  none.

`install()` puts a finder in front of the import system and imports nothing itself; each repair happens when the
module is asked for and only if the library really cannot be loaded. With matching wheels nothing changes. Used by
the test server alone: the pack does not ship it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = []  # a torch.library.Library takes its schemas back when it is collected


def install() -> None:
    if not any(isinstance(finder, RepairFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RepairFinder())


class RepairFinder:
    """Finds the two modules as Python would, and runs a repair before or after their code."""

    def find_spec(self, name, path=None, target=None):
        if name not in ("torchvision", "torchaudio._extension.utils"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not spec.origin:
            return None
        if name == "torchvision":
            declare_missing_operators(Path(spec.origin).parent)
        else:
            spec.loader = _QuietLoader(name, spec.origin)
        return spec


class _QuietLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module) -> None:
        super().exec_module(module)
        load = module._load_lib

        def load_if_possible(lib: str) -> bool:
            try:
                return load(lib)
            except OSError:
                return False

        module._load_lib = load_if_possible


def declare_missing_operators(torchvision: Path) -> None:
    import torch

    library = next(iter(torchvision.glob("_C*")), None)
    try:
        if library is not None:
            torch.ops.load_library(str(library))
            return
    except OSError:
        pass
    declared = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        declared.define(schema)
    _declared.append(declared)

"""The models that can be planned: the shapes of all registered families, by the name that `qvg plan --model` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .family import FAMILIES
from .shape import ModelShape


class Catalogue(Mapping[str, ModelShape]):
    """A live view of `Family.shapes` over `FAMILIES`, in the order of registration."""

    def __getitem__(self, name: str) -> ModelShape:
        for family in FAMILIES.values():
            if name in family.shapes:
                return family.shapes[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        for family in FAMILIES.values():
            yield from family.shapes

    def __len__(self) -> int:
        return sum(len(family.shapes) for family in FAMILIES.values())


MODELS = Catalogue()

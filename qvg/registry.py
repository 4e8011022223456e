"""Named implementations of one interface: codecs, model families. A new one is its own file and one call of `register`.

    CODECS.register(MyCodec("mine"))
    codec = CODECS["mine"]              # ValueError with the names that exist for an unknown one
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    name: str


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Implementations by name, in the order in which they were registered. kind: what they are, for error sentences."""

    def __init__(self, kind: str):
        self.kind = kind
        self._known: dict[str, T] = {}

    def register(self, thing: T) -> T:
        """Add an implementation under `thing.name`. Registering the same object again changes nothing.

        Raises ValueError when the name is taken by another.
        """
        if self._known.setdefault(thing.name, thing) is not thing:
            raise ValueError(f"There is already a {self.kind} named {thing.name!r}; choose another name.")
        return thing

    def remove(self, name: str) -> None:
        """Undo `register`, for tests and for packs that are unloaded."""
        self._known.pop(name, None)

    def __getitem__(self, name: str) -> T:
        """Raises ValueError for an unknown name."""
        if name not in self._known:
            raise ValueError(f"{self.kind} is {name!r}; choose one of {', '.join(self._known)}.")
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def values(self) -> Iterator[T]:
        return iter(self._known.values())


# ways to keep keys and values, see `codec.base.Codec`
CODECS: Registry = Registry("codec")

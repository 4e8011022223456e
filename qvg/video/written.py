"""What a video writer has safely on the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """frames on the disk; size: bytes of a growing file (for images, 1 once this writer wrote one); digest: of the frames as encoded."""

    frames: int = 0
    size: int = 0
    digest: str = ""


def chained_digest(before: bytes, data: bytes) -> str:
    """SHA-256 of data, continued from an earlier digest."""
    return hashlib.sha256(before + data).hexdigest()

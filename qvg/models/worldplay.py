"""The sizes of HY-WorldPlay, for `qvg plan`; its networks are not part of this pack.

Sources: the published configurations. A latent frame of Wan 2.2 5B at 1280 x 704 is 880 tokens, one of HunyuanVideo-1.5 at 832 x 480 is
1560.
"""

from __future__ import annotations

from .family import Family
from .shape import ModelShape

WORLDPLAY = Family(name="hy-worldplay", title="HY-WorldPlay", shapes={
    "hy-worldplay-5b": ModelShape(30, 24, 32, (1280, 704), 4, 24, note="raw keys and values; the original stores two copies of each"),
    "hy-worldplay-8b": ModelShape(54, 16, 16, (832, 480), 4, 24, note="the original attends to 20 context latents at most"),
})

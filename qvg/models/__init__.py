"""Model families (one a file), opening their checkpoints, and the names in their LoRA files.

A family is registered here, in the order in which plans list its models. Another pack registers its own with the same call.
"""

from .family import FAMILIES, Family
from .longcat import LONGCAT
from .shape import ModelShape
from .wan import WAN
from .worldplay import WORLDPLAY

__all__ = ["FAMILIES", "Family", "ModelShape"]

for _family in (WAN, LONGCAT, WORLDPLAY):
    FAMILIES.register(_family)

"""Model families, opening their checkpoints, and the names in their LoRA files.

    from comfyui_qvg.qvg.models import FAMILIES, open_checkpoint

    state, found = open_checkpoint("self_forcing_dmd.pt")
    network = FAMILIES[found.family].open(state)

| module | what it does |
|---|---|
| `family`, `shape` | what the pack knows about a family; sizes of a model for a memory plan |
| `wan`, `longcat`, `worldplay` | one family each; `wan_vae` and `longcat_schedule` belong to two of them |
| `catalogue`, `weights` | the shapes of all families by model name; bits of weight types |
| `checkpoint`, `names`, `layout`, `validate`, `refusals` | reading a checkpoint: unwrapping, renaming, checking, refusing |
| `lora`, `lora_fields` | LoRA files as changes of a network's parameters |
| `fingerprint` | a hash of a network's weights |

A family is registered here, in the order in which plans list its models. Another pack registers its own with the same call.
"""

from .checkpoint import Description, open_checkpoint
from .family import FAMILIES, Family, Sizes
from .longcat import LONGCAT
from .shape import ModelShape
from .wan import WAN
from .worldplay import WORLDPLAY

__all__ = ["FAMILIES", "Description", "Family", "ModelShape", "Sizes", "open_checkpoint"]

for _family in (WAN, LONGCAT, WORLDPLAY):
    FAMILIES.register(_family)

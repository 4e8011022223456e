"""Model families, opening their checkpoints, and the names in their LoRA files.

    from comfyui_qvg.qvg.models import FAMILIES, open_checkpoint

    state, found = open_checkpoint("self_forcing_dmd.pt")
    network = FAMILIES[found.family].open(state)

| module | what it does |
|---|---|
| `family`, `shape` | what the pack knows about a family; sizes of a model for a memory plan |
| `wan`, `longcat`, `worldplay_wan`, `worldplay_hunyuan` | one family each |
| `wan_vae`, `longcat_schedule`, `worldplay_schedule` | the VAE of Wan 2.1; noise levels of the families with schedules of their own |
| `hunyuan_text`, `hunyuan_layers` | the text side of HunyuanVideo-1.5, and what it has in common with the video side |
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
from .worldplay_hunyuan import HY_WORLDPLAY_8B
from .worldplay_wan import HY_WORLDPLAY_5B

__all__ = ["FAMILIES", "Description", "Family", "ModelShape", "Sizes", "open_checkpoint"]

for _family in (WAN, LONGCAT, HY_WORLDPLAY_5B, HY_WORLDPLAY_8B):
    FAMILIES.register(_family)

"""Noise levels and guidance for walks through HY-WorldPlay, as published, and where its licence holds.

The distilled models take four Euler steps without guidance. Base models take many, with classifier-free guidance. Both have the same
form: equal steps from the highest level to 0, shifted to s' = shift * s / (1 + (shift - 1) * s). The 8B begins at 1. The 5B has the
scheduler of Wan 2.2 TI2V 5B, whose highest level is one training step of 1000 below 1; the released code runs it distilled only.
Sources: HY-WorldPlay, hyvideo/commons (480p_i2v), hyvideo/schedulers, wan/inference; Wan 2.2 TI2V 5B, the scheduler's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

# of finished frames and of a start image, which carry no noise
CONTEXT_TIMESTEP = 14.0


@dataclass(frozen=True)
class WorldSampling:
    """How a variant is sampled. shift, highest: of the base model. distilled_shift: of the distilled one, which begins at 1. guidance:
    of the base model. steps, distilled_steps: by default."""

    shift: float
    distilled_shift: float
    guidance: float
    highest: float = 1.0
    steps: int = 50
    distilled_steps: int = 4

    def levels(self, steps: int, *, distilled: bool, shift: float | None = None) -> tuple[float, ...]:
        """Noise levels in falling order, steps + 1 of them, the last 0. shift: another one for the base model.

        Raises ValueError for a number of steps outside 1 to 1000.
        """
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps is {steps}; choose 1 to 1000. Distilled models were made for {self.distilled_steps}.")
        shift, highest = (self.distilled_shift, 1.0) if distilled else (self.shift if shift is None else shift, self.highest)
        equal = (highest * (1 - number / steps) for number in range(steps))
        return (*(shift * level / (1 + (shift - 1) * level) for level in equal), 0.0)


LICENCE = ("These weights are under the Tencent HY-WorldPlay Community License, which excludes the European Union, the United Kingdom and "
           "South Korea.")
SAMPLING_5B = WorldSampling(shift=5.0, distilled_shift=8.0, guidance=5.0, highest=0.999)
SAMPLING_8B = WorldSampling(shift=5.0, distilled_shift=5.0, guidance=6.0)

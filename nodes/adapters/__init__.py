"""How each model family's attention is made to read a quantized cache, and how its LoRAs are named."""

from . import lora as lora

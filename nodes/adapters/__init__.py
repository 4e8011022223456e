"""How each model family's attention is made to read a quantized cache."""

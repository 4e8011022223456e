"""Positions, and attention of one chunk over a quantized history."""

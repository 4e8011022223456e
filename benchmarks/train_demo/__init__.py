"""Trains the tiny model from scratch: `python -m comfyui_qvg.benchmarks.train_demo --out DIR`."""

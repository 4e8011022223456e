"""Trains the tiny world model from scratch: `python -m comfyui_qvg.benchmarks.train_world --out DIR`."""

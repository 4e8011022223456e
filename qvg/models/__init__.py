"""Networks in plain torch, for the command line and for what ComfyUI's core lacks."""

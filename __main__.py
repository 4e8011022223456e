"""`python -m comfyui_qvg` is the `qvg` command."""

if __name__ == "__main__":
    from .qvg.commands.cli import main
    from .qvg.commands.processes import leave

    raise SystemExit(leave(main()))

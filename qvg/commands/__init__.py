"""The `qvg` command."""

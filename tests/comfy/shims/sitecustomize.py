"""Python imports this at start when the folder is on PYTHONPATH; see cpu_wheels.py."""

import cpu_wheels

cpu_wheels.install()

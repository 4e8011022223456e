"""What belongs to every figure: the hardware, the versions, the command and the date."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch


def hardware(device: torch.device | str) -> str:
    """The name of a device; of a CPU, with the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device} of {name}"


def environment(device: torch.device | str, command: str) -> dict:
    """Hardware, versions, command and date."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "absent"
    return {"device": hardware(device), "torch": torch.__version__, "triton": triton_version, "python": platform.python_version(),
            "command": command, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}

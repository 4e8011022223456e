"""Install ComfyUI's requirements into this Python without touching its torch.

    python tests/comfy/install_requirements.py

ComfyUI asks for torchvision and torchaudio without versions. Installed plainly, each brings the torch that it was
built for. Here the torch that is present is held, its two companions are installed first and without their
dependencies, and the rest follows under constraints. (PyPI's Linux companions want CUDA libraries;
shims/cpu_wheels.py lets them import beside a CPU torch.)

Installing twice costs a few seconds. Ends with status 0 and one line when there is no ComfyUI.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from comfy_paths import find_comfyui

# torch -> torchvision, torchaudio; torchaudio's releases ended at 2.11
COMPANIONS = {"2.13": ("0.28.0", "2.11.0")}


def main() -> None:
    root = find_comfyui()
    if root is None:
        print("no ComfyUI found (COMFYUI_PATH, ~/comfy/ComfyUI): nothing to install")
        return
    torch = importlib.metadata.version("torch").partition("+")[0]
    held = [f"torch=={torch}"]
    companions = COMPANIONS.get(torch.rpartition(".")[0])
    if companions:
        pair = [f"torchvision=={companions[0]}", f"torchaudio=={companions[1]}"]
        pip("--no-deps", *pair)
        held += pair
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(held))
        pip("-r", str(root / "requirements.txt"), "-c", str(constraints))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()

"""Install the requirements of every ComfyUI checkout without touching this Python's torch.

    python tests/comfy/install_requirements.py

The first checkout's go into this Python. Each further one gets an environment of its own below it, which sees all
packages of this one (torch among them) and holds only what its ComfyUI wants in another version.

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
import sysconfig
import tempfile
import venv
from pathlib import Path

from comfy_paths import UPDATED_ALONE, checkouts, unmet, version

# torch -> torchvision, torchaudio; torchaudio's releases ended at 2.11
COMPANIONS = {"2.13": ("0.28.0", "2.11.0")}
# core -> a newer frontend than it pins, so that the newest of both are run together
FRONTENDS = {"0.33.0": "1.58.1"}


def main() -> None:
    found = checkouts()
    if not found:
        print("no ComfyUI found (COMFYUI_PATH, ~/comfy/ComfyUI, ~/comfy/ComfyUI-*): nothing to install")
    for root in found:
        python = sys.executable if root == found[0] else make_environment(root)
        print(f"ComfyUI {version(root)} at {root}: {python}", flush=True)
        install(root, python)


def environment_python(root: Path) -> str:
    """The Python that runs this checkout: this one where it has all that the checkout asks for, else the one of its own."""
    own = environment(root) / "bin" / "python"
    return sys.executable if not unmet(root) or not own.exists() else str(own)


def environment(root: Path) -> Path:
    return Path(sys.prefix) / "comfyui" / f"{root.name} {version(root)}"


def make_environment(root: Path) -> str:
    """An environment whose packages go before this one's."""
    folder = environment(root)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # addsitedir, unlike a plain path, reads the .pth files there, too: the pack's own editable install is one
    (Path(packages) / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return str(folder / "bin" / "python")


def install(root: Path, python: str) -> None:
    torch = importlib.metadata.version("torch").partition("+")[0]
    held = [f"torch=={torch}"]
    companions = COMPANIONS.get(torch.rpartition(".")[0])
    if companions:
        pair = [f"torchvision=={companions[0]}", f"torchaudio=={companions[1]}"]
        pip(python, "--no-deps", *pair)
        held += pair
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(held))
        wanted, frontend = (root / "requirements.txt").read_text(), FRONTENDS.get(version(root))
        if frontend:
            wanted = "\n".join(f"{UPDATED_ALONE}=={frontend}" if line.startswith(UPDATED_ALONE) else line for line in wanted.splitlines())
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(wanted)
        pip(python, "-r", str(requirements), "-c", str(constraints))


def pip(python: str, *arguments: str) -> None:
    """This Python's pip, for another Python: an environment made here has none of its own."""
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()

"""Run the tests inside ComfyUI on every checkout that is here (comfy_paths.py says which), one after the other.

    python tests/comfy/install_requirements.py
    python tests/comfy/every_version.py [arguments of pytest]

Each run is a pytest of its own, by the Python that has that ComfyUI's requirements, because one process can import
only one ComfyUI. Tests marked `once` are run on the first alone. Ends, after all have run, with the first status that
is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys

from comfy_paths import REPOSITORY, checkouts, version
from install_requirements import environment_python


def main(arguments: list[str]) -> int:
    statuses = []
    for number, root in enumerate(checkouts() or [None]):
        environment, python = dict(os.environ), sys.executable
        if root is not None:
            environment["COMFYUI_PATH"], python = str(root), environment_python(root)
            print(f"\nComfyUI {version(root)}, {root}", flush=True)
        command = [python, "-m", "pytest", "-m", "comfyui and not once" if number else "comfyui", "tests/comfy", *arguments]
        statuses.append(subprocess.run(command, cwd=REPOSITORY, env=environment).returncode)
    # 5: nothing of what was asked for is for this version
    return next((status for status in statuses if status not in (0, 5)), min(statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

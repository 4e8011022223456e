"""What an installation and the registry's archive hold: every package, every dependency, nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
# the first parts of all paths that a person who installs the pack receives
SHIPPED = {
    *("__init__.py", "nodes", "qvg", "kernels", "workflows", "subgraphs", "web", "locales"),
    *("pyproject.toml", "requirements.txt", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"),
}
SHIPPED_SUFFIXES = {".py", ".toml", ".txt", ".md", ".json", ".js", ".jpg", ".png", ".svg", ".safetensors", ""}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked(*flags: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", *flags], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listing.stdout.splitlines()]


def archive() -> list[Path]:
    """What `comfy node pack` puts into the registry's archive: tracked files that .comfyignore does not name."""
    left_out = set(tracked("--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [path for path in tracked() if path not in left_out]


def test_requirements_are_the_project_dependencies(project):
    lines = [line.replace('"', "'") for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert lines == project["project"]["dependencies"]


def test_every_package_is_installed(project):
    packages = {path.parent for path in archive() if path.name == "__init__.py" and len(path.parts) > 1}
    names = {"comfyui_qvg"} | {".".join(("comfyui_qvg", *path.parts)) for path in packages}
    assert set(project["tool"]["setuptools"]["packages"]) == names


def test_archive_holds_no_surprises():
    assert [path for path in archive() if path.parts[0] not in SHIPPED or path.suffix not in SHIPPED_SUFFIXES] == []


def test_python_source_is_ascii():
    """Some Windows installations read source in a code page of their own."""
    assert [path for path in archive() if path.suffix == ".py" and not (ROOT / path).read_bytes().isascii()] == []

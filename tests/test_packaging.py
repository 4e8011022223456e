"""What an installation and the registry's archive hold: every package, every dependency, nothing else."""

import ast
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
# the first parts of all paths that a person who installs the pack receives
SHIPPED = {
    *("__init__.py", "__main__.py", "nodes", "qvg", "kernels", "workflows", "subgraphs", "web", "locales"),
    *("pyproject.toml", "requirements.txt", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"),
}
SHIPPED_SUFFIXES = {".py", ".toml", ".txt", ".md", ".json", ".js", ".jpg", ".png", ".webp", ".svg", ".safetensors", ""}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked(*flags: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", *flags], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listing.stdout.splitlines()]


def archive(*others: str) -> list[Path]:
    """What `comfy node pack` puts into the registry's archive: tracked files that .comfyignore does not name.

    others: flags of `git ls-files` for files that shall be taken as tracked.
    """
    left_out = {path for kind in ("--cached", "--others") for path in tracked(kind, "--ignored", "--exclude-from=.comfyignore")}
    return [path for path in tracked("--cached", *others) if path not in left_out and (ROOT / path).is_file()]


def test_requirements_are_the_project_dependencies(project):
    lines = [line.replace('"', "'") for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert lines == project["project"]["dependencies"]


def test_every_package_is_installed(project):
    packages = {path.parent for path in archive() if path.name == "__init__.py" and len(path.parts) > 1}
    names = {"comfyui_qvg"} | {".".join(("comfyui_qvg", *path.parts)) for path in packages}
    assert set(project["tool"]["setuptools"]["packages"]) == names


def test_workflows_pin_their_actions_to_commits():
    """A tag or a branch can be moved to other code, which would then see the registry's token."""
    used = [line.strip().removeprefix("- ") for path in (ROOT / ".github/workflows").glob("*.yml")
            for line in path.read_text().splitlines() if line.strip().removeprefix("- ").startswith("uses:")]
    assert used and [line for line in used if not re.fullmatch(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # .+", line)] == []


def test_archive_holds_no_surprises():
    assert [path for path in archive() if path.parts[0] not in SHIPPED or path.suffix not in SHIPPED_SUFFIXES] == []


def test_archive_is_small():
    """The registry takes more, but people wait for it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in archive():
            file.write(ROOT / path, path)
    assert packed.tell() < 25_000_000


# what the registry's scanner has flagged in other packs, and what a pack has no business to do
FORBIDDEN = {
    "subprocess", "os.system", "os.popen", "os.environ", "os.getenv", "eval", "exec", "compile", "__import__", "pickle", "marshal",
    "shelve", "requests", "urllib", "http.client", "socket", "aiohttp.ClientSession", "httpx", "ctypes", "torch.cuda.empty_cache"}
# the error of a refused file is caught by its name
HARMLESS = {"pickle", "pickle.UnpicklingError"}
# what NCCL, Gloo and Ray are told before they start has no other way in
ALLOWED = {Path("qvg/video/crew.py"): {"os.environ", "os.environ.pop", "os.environ.update"}}


def names_used(source: str) -> set[str]:
    """Modules imported, and names and dotted names used, in a source text."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, (ast.Name, ast.Attribute)):
            used.add(ast.unparse(node))
    return used


def test_archive_does_nothing_that_scanners_flag():
    for path in archive():
        if path.suffix == ".py":
            found = {name for name in names_used((ROOT / path).read_text()) - HARMLESS if any(
                name == word or name.startswith(f"{word}.") for word in FORBIDDEN)}
            assert found == ALLOWED.get(path, set()), path
        if path.suffix == ".js":
            source = (ROOT / path).read_text()
            assert not re.search(r"\beval\(|new Function|innerHTML|XMLHttpRequest|WebSocket|document\.write", source), path
            # a link that a person may follow is not a request
            assert not re.search(r"(?:import|fetch|fetchApi)\(?\s*[\"'`]https?:", source), path


def test_pickles_are_read_as_weights_only():
    for path in archive():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords), path


def test_python_source_is_ascii():
    """Some Windows installations read source in a code page of their own."""
    assert [path for path in archive() if path.suffix == ".py" and not (ROOT / path).read_bytes().isascii()] == []

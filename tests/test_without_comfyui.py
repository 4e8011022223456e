"""What people without (all of) ComfyUI's packages see: the tests inside ComfyUI are skipped, in one loud line that says what to do."""

import os
import subprocess
import sys

import packaging
import pytest

from comfy_paths import REPOSITORY, checkouts, find_comfyui, unmet
from install_requirements import environment_python, make_environment

# what ComfyUI brings and the pack's own requirements do not
FOREIGN = ("aiohttp", "alembic", "comfy_kitchen", "einops", "kornia", "pydantic", "requests", "scipy", "sqlalchemy", "torchaudio",
           "torchsde", "torchvision", "transformers", "yaml", "yarl")
HIDE = '''
import sys


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hide())
'''


@pytest.fixture
def checkout(tmp_path):
    """make("aiohttp", ...) -> a folder that looks like a ComfyUI whose requirements are these lines."""
    def make(*lines, name="ComfyUI"):
        root = tmp_path / name
        (root / "comfy").mkdir(parents=True)
        (root / "main.py").touch()
        (root / "comfyui_version.py").write_text('__version__ = "0.99.0"\n')
        (root / "requirements.txt").write_text("\n".join(lines))
        return root

    return make


def run_tests(tmp_path, comfyui, *arguments, tests="tests/comfy", hidden=FOREIGN, **environment):
    """(status, output) of tests inside ComfyUI, in a process that cannot import what is hidden."""
    folder = tmp_path / "hide"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, *arguments], cwd=REPOSITORY,
                          env={**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": path, **environment}, capture_output=True,
                          text=True)
    return done.returncode, done.stdout + done.stderr


def loud_lines(output):
    return [line for line in output.splitlines() if line.startswith("NOT RUN")]


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_checkout_without_its_requirements(tmp_path, checkout, workers):
    """A person's own ComfyUI lies at the usual place, and its packages in another Python."""
    status, output = run_tests(tmp_path, checkout("a-package-that-nobody-has>=1.2", "numpy"), *workers)
    (line,) = loud_lines(output)
    assert status == 0 and "error" not in output.lower()
    assert "ComfyUI 0.99.0" in line and "a-package-that-nobody-has>=1.2:" in line and "tests/comfy/install_requirements.py" in line
    assert int(line.split()[2]) > 100, "every test is counted"


def test_no_checkout(tmp_path):
    status, output = run_tests(tmp_path, tmp_path / "nothing")
    (line,) = loud_lines(output)
    assert status == 0 and f"no ComfyUI at {tmp_path / 'nothing'}: set COMFYUI_PATH" in line


@pytest.mark.parametrize(("hidden", "environment", "words"), [
    (("playwright",), {}, 'install -e ".[test]"'),
    ((), {"PATH": os.path.dirname(sys.executable), "PLAYWRIGHT_BROWSERS_PATH": "/nowhere", "CHROMIUM": ""}, "apt-get install chromium"),
    ((), {"CHROMIUM": "/nowhere/chromium"}, "CHROMIUM names /nowhere/chromium")])
def test_no_browser(tmp_path, checkout, hidden, environment, words):
    """Only the tests in the browser are skipped; one is asked for, since a stand-in for a checkout can start no server."""
    test = "tests/comfy/test_first_run.py::test_help_opens_beside_the_node"
    status, output = run_tests(tmp_path, checkout("numpy"), tests=test, hidden=hidden, **environment)
    (line,) = loud_lines(output)
    assert status == 0 and line.startswith("NOT RUN: 1 real-ComfyUI test:") and words in line


def test_requirements_are_read_as_pip_reads_them(checkout):
    root = checkout("--extra-index-url https://somewhere", "# a comment", "", "numpy>=1.0  # why", "pytest==0.0.1", "torch",
                    "a-package-that-nobody-has; python_version < '3'", "comfyui-frontend-package==0.0.1")
    lacking = unmet(root)
    assert lacking[0].startswith("pytest==0.0.1 (found ")
    # a newer frontend than core pins is as good, an older or missing one is not
    assert all(text.startswith("comfyui-frontend-package==0.0.1") and "found" not in text for text in lacking[1:])


def test_several_checkouts(monkeypatch, checkout, tmp_path):
    """The first whose requirements are there is run; by default ~/comfy/ComfyUI and ~/comfy/ComfyUI-*."""
    lacking, whole = checkout("a-package-that-nobody-has", name="comfy/ComfyUI"), checkout("numpy", name="comfy/ComfyUI-0.99")
    (tmp_path / "comfy" / "ComfyUI-notes").mkdir()
    try:
        for home, named in ((tmp_path, None), ("/nowhere", f"{lacking}{os.pathsep}{whole}{os.pathsep}{lacking}")):
            monkeypatch.setenv("HOME", str(home))
            monkeypatch.delenv("COMFYUI_PATH", raising=False)
            if named:
                monkeypatch.setenv("COMFYUI_PATH", named)
            find_comfyui.cache_clear()
            assert checkouts() == [lacking, whole] and find_comfyui() == whole
    finally:
        find_comfyui.cache_clear()


def test_each_version_has_its_environment(tmp_path, monkeypatch, checkout):
    """One that sees this Python's packages, and its own before them."""
    root = checkout("numpy")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    python = make_environment(root)
    assert environment_python(root) == sys.executable, "what this Python has needs no other"
    (packages,) = (tmp_path / "environment").glob("comfyui/*/lib/*/site-packages")
    (packages / "pluggy.py").touch()
    code = "import pluggy, packaging; print(pluggy.__file__); print(packaging.__file__)"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [str(packages / "pluggy.py"), packaging.__file__]


def test_every_version_is_run(checkout):
    """A pytest for each; what is marked `once` is for the first."""
    roots = [checkout("a-package-that-nobody-has", name=name) for name in ("old", "new")]
    tests = "test_from_browse_templates or test_it_sends_little"
    done = subprocess.run([sys.executable, "tests/comfy/every_version.py", "-q", "-p", "no:cacheprovider", "-k", tests], text=True,
                          env={**os.environ, "COMFYUI_PATH": os.pathsep.join(map(str, roots))}, cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0 and all(f"ComfyUI 0.99.0, {root}" in done.stdout for root in roots)
    assert [int(line.split()[2]) for line in loud_lines(done.stdout)] == [2, 1]

"""The shape of the source tree: which package may import which, and how large files and functions may be. Read from the files alone."""

import ast
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what each wing of qvg/ may import; a wing only ever imports wings above it
ALLOWED = {
    "units": (),
    "registry": (),
    "files": ("units",),
    "backends": ("registry",),
    "codec": ("registry", "backends"),
    "settings": ("registry", "codec"),
    "cache": ("units", "registry", "backends", "codec", "settings"),
    "attention": ("backends", "settings", "cache"),
    "models": ("registry", "files", "cache", "attention"),
    "video": ("units", "registry", "files", "backends", "codec", "settings", "cache", "attention", "models"),
    "report": ("units", "settings", "cache", "attention", "models"),
    "measure": ("units", "files", "registry", "codec", "settings", "cache", "attention", "models", "video", "report"),
    "demo": ("units", "settings", "models", "video", "report", "measure"),
    "commands": ("units", "files", "backends", "settings", "attention", "models", "video", "report", "measure", "demo"),
}
MAX_FILE, MAX_MEDIAN, MAX_FUNCTION, MAX_ARGUMENTS = 400, 150, 60, 10


def files(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Dotted names, from the root of the tree, of what a file imports by relative imports, and the names of absolute imports."""
    package = path.relative_to(ROOT).parent.parts
    relative, absolute = [], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[:len(package) - node.level + 1], *(node.module or "").split("."))
            relative += [tuple(part for part in (*base, alias.name) if part) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            absolute.append(node.module)
        elif isinstance(node, ast.Import):
            absolute += [alias.name for alias in node.names]
    return relative, absolute


def wing(parts):
    """The wing of a dotted name or path in qvg/; "" for the face of qvg itself."""
    return Path(parts[1]).stem.replace("__init__", "") if len(parts) > 1 else ""


def test_wings_are_in_order():
    """The table has no circle: every wing names only wings above it, and every wing is in the table."""
    above = set()
    for name, allowed in ALLOWED.items():
        assert above.issuperset(allowed), name
        above.add(name)
    assert {wing(path.relative_to(ROOT).parts) for path in files("qvg")} - {""} == above


@pytest.mark.parametrize("name", ALLOWED)
def test_a_wing_imports_only_wings_above_it(name):
    for path in files("qvg"):
        if wing(path.relative_to(ROOT).parts) != name:
            continue
        for target in imports(path)[0]:
            assert target[0] == "qvg", f"{path.relative_to(ROOT)} imports {'.'.join(target)}"
            found = wing(target)
            assert found == name or found in ALLOWED[name], f"{path.relative_to(ROOT)} imports {'.'.join(target)}; see ALLOWED"


def test_kernels_import_only_qvg():
    for path in files("kernels"):
        for target in imports(path)[0]:
            assert target[0] in ("kernels", "qvg"), f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_nodes_import_only_qvg():
    """Kernels are a backend, which is found by its name."""
    for path in files("nodes"):
        for target in imports(path)[0]:
            assert target[0] in ("nodes", "qvg"), f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_imports_are_relative():
    """ComfyUI loads the pack under the name of its folder."""
    for path in files("qvg", "kernels", "nodes"):
        names = {name.partition(".")[0] for name in imports(path)[1]}
        # `nodes` would be ComfyUI's module
        assert not names & {"comfyui_qvg", "qvg", "kernels"}, path.relative_to(ROOT)


def test_ray_is_imported_in_one_place():
    """Where it is needed, because it is optional and takes a second."""
    sources = {path.relative_to(ROOT).as_posix(): path for path in files("qvg", "kernels", "nodes") if "ray" in imports(path)[1]}
    assert list(sources) == ["qvg/video/crew.py"]
    assert not [line for line in sources.popitem()[1].read_text().splitlines() if line.startswith(("import ray", "from ray"))]


@pytest.mark.parametrize("package", ["qvg", "kernels", "nodes"])
def test_files_are_short(package):
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files(package)}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE}
    assert median(lengths.values()) <= MAX_MEDIAN


def functions(path):
    """(name, node) of a file's functions and methods, names with their class."""
    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{getattr(child, 'name', '')}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
            yield from walk(child, f"{name}." if isinstance(child, ast.ClassDef | ast.FunctionDef) else prefix)

    return walk(ast.parse(path.read_text()), f"{path.relative_to(ROOT)}: ")


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for path in files("qvg", "nodes") for name, node in functions(path)}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION}


def test_functions_take_few_arguments():
    """Except `execute` of a node, whose arguments are the inputs of the node."""
    counts = {}
    for path in files("qvg", "nodes"):
        for name, node in functions(path):
            if path.is_relative_to(ROOT / "nodes") and node.name in ("execute", "fingerprint_inputs", "validate_inputs"):
                continue
            arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            counts[name] = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
    assert not {name: count for name, count in counts.items() if count > MAX_ARGUMENTS}

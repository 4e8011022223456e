"""Mutation testing: small faults are put into the code, one at a time, and the tests of that part should fail.

    python -m comfyui_qvg.benchmarks.mutation --workers 2 --out mutation.json
    python -m comfyui_qvg.benchmarks.mutation --again mutation.json        # repeat the mutants that survived

cosmic-ray (the `dev` extra) finds and makes the changes. A site is a place in the code; `--count` sites are sampled by a hash of the seed
and of the line, and each gets one of its changes, so an edit elsewhere does not change the sample. Excluded are annotations, which are not
evaluated, `is` in place of `==`, and `attention.streams`, which runs only on a GPU. Every worker has its own copy of the tree; no network
is needed. Slow imports are done once, and every mutant runs in a process forked from there, so this does not run on Windows.

A mutant is killed when a test fails, or when its tests take `SECONDS` of processor time, several times what they need. Mutants run in the
order of their hashes, so an interrupted run is also a sample; `--again` continues it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import multiprocessing
import os
import queue
import resource
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# tests of one part, most effective first
CODEC = ["test_precision", "test_centroids", "test_attention", "test_bytes", "test_codec", "test_policy", "test_paper", "test_finite"]
KMEANS = ["test_precision", "test_centroids", "test_attention", "test_codec", "test_finite"]
CACHE = ["test_policy", "test_policy_changes", "test_bytes", "test_bytes_forecast", "test_attention", "test_loop", "test_network",
         "test_lifetime", "test_codec"]
POLICY = ["test_bytes", "test_bytes_forecast", "test_policy", "test_policy_changes", "test_context", "test_codec", "test_plan",
          "test_forecast", "test_lifetime"]
LIFETIME = ["test_policy", "test_policy_changes", "test_lifetime", "test_codec", "test_forecast"]
LOOP = ["test_loop", "test_network", "test_sampler"]
# modules and their tests; survivors also run the slower tests of `SLOWER`
PARTS = {
    **{f"qvg/codec/{name}.py": CODEC for name in ("qvg", "pair", "base", "plain", "misfit")},
    **{f"qvg/codec/{name}.py": KMEANS for name in ("smoothing", "kmeans")},
    "qvg/codec/planes.py": ["test_precision", "test_codec"],
    **{f"qvg/cache/{name}.py": CACHE for name in ("kv_cache", "layer", "entry", "read", "stats")},
    "qvg/cache/codebook_lifetime.py": LIFETIME,
    **{f"qvg/cache/{name}.py": POLICY for name in ("ageing", "codebooks", "geometry", "limits", "sizes", "forecast")},
    "qvg/attention/cached.py": ["test_attention", *LOOP],
    **{f"qvg/video/{name}.py": LOOP for name in ("run", "noise", "network", "sampler")},
}
SLOWER = {
    **{f"qvg/codec/{name}.py": ["test_codec", "test_offload"] for name in ("qvg", "pair", "base", "plain", "misfit")},
    **{f"qvg/codec/{name}.py": ["test_codec"] for name in ("smoothing", "kmeans")},
    **{f"qvg/cache/{name}.py": ["test_offload", "test_pressure", "test_storage"]
       for name in ("kv_cache", "layer", "entry", "read", "stats")},
    "qvg/cache/codebook_lifetime.py": ["test_offload"],
    **{f"qvg/cache/{name}.py": ["test_offload", "test_pressure"] for name in ("ageing", "codebooks", "geometry", "limits", "sizes")},
    "qvg/cache/forecast.py": ["test_offload"],
    "qvg/attention/cached.py": ["test_offload"],
    "qvg/video/sampler.py": ["test_segments", "test_storage"],
}
# tests in Triton's interpreter run only among the slower ones
SKIPPED = "not triton and not kernel"
PRELOADED = ["torch", "numpy", "pytest", "hypothesis", "safetensors.torch"]
SECONDS = 120
SIGNATURE = ("parameters", "typedargslist", "varargslist", "param", "lambdef")
LEFT_BEHIND = shutil.ignore_patterns(".git", ".*_cache", ".venv", ".hypothesis", "shared")


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place of a cosmic-ray operator in a module. before and after: the line, stripped."""

    key: str
    module: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str


def unused(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((line, column), (line, column)) of every annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        found += [((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)) for part in parts if part is not None]
    return found


def changes(source: str) -> dict[tuple, list[tuple[str, int]]]:
    """Possible changes by site: ((line, column), (line, column)) -> cosmic-ray's operators, each with the number of the occurrence."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = [node for node in ast_nodes(get_ast(source)) if node.type not in ("name", "string", "newline", "endmarker")]
    outside, sites = unused(source), {}
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or (name.endswith(("_Is", "_IsNot")) and "_Is_" not in name and "_IsNot_" not in name):
            continue
        occurrence = 0
        for node in nodes:
            for start, end in operator().mutation_positions(node):
                # the lone `*` of a signature looks like an operator
                if node.parent.type not in SIGNATURE and not any(low <= start and end <= high for low, high in outside):
                    sites.setdefault((start, end), []).append((name, occurrence))
                occurrence += 1
    return sites


def mutated(source: str, operator: str, occurrence: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(source, get_operator(operator)(), occurrence)


def compiles(source: str) -> bool:
    """Not every change is one: `*shape` looks like a product to cosmic-ray."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def draw(count: int, seed: int) -> list[Mutant]:
    """The sample. A site is known by its module, its line's text and how often both came before."""
    ranked = []
    for module in PARTS:
        source = (ROOT / module).read_text()
        lines, seen = source.splitlines(), {}
        for (start, _), found in sorted(changes(source).items()):
            text = lines[start[0] - 1].strip()
            seen[text] = seen.get(text, -1) + 1
            digest = hashlib.sha256(f"{seed}/{module}/{text}/{seen[text]}".encode()).hexdigest()
            ranked.append((digest, module, start[0], found))
    sample = []
    for digest, module, line, found in sorted(ranked):
        source = (ROOT / module).read_text()
        begin = int(digest[-8:], 16)
        for number in range(len(found)):
            operator, occurrence = found[(begin + number) % len(found)]
            changed = mutated(source, operator, occurrence)
            if compiles(changed):
                lines = list(difflib.ndiff(source.splitlines(), changed.splitlines()))
                before, after = (" ".join(text[2:].strip() for text in lines if text.startswith(sign)) for sign in ("- ", "+ "))
                sample.append(Mutant(digest[:12], module, line, operator.removeprefix("core/"), occurrence, before, after))
                break
        if len(sample) == count:
            break
    return sample


def run_tests(tree: str, tests: list[str], log: str, seconds: int, chosen: str) -> None:
    """In a process of its own: pytest over a copy of the tree; its exit code is the process's, which is ended after so many seconds of
    processor time."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.chdir(tree)
    # an installed package, and the folder from which this was started, would be found before the copy
    parent = str(Path(tree).parent)
    os.environ["PYTHONPATH"], sys.dont_write_bytecode = parent, True
    sys.path[:] = [parent, *(path for path in sys.path if path and not (Path(path) / "comfyui_qvg").exists())]
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui_qvg"]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not gpu", "-k", chosen]
    # file by file, because most mutants do not get far and the others need not be read
    code = next((code for name in tests if (code := pytest.main([*options, f"tests/{name}.py"]))), 0)
    sys.stdout.flush()
    os._exit(int(code))


class Worker:
    """A copy of the tree in which mutants are tried one after the other."""

    def __init__(self, folder: Path, context):
        self.tree, self.context, self.log = folder / "comfyui_qvg", context, folder / "log"
        shutil.copytree(ROOT, self.tree, ignore=LEFT_BEHIND)

    def run(self, tests: list[str], seconds: int, chosen: str = SKIPPED) -> tuple[str, float, str]:
        """-> (passed, failed or timeout; seconds; the last lines that pytest wrote). Raises RuntimeError where no test ran."""
        started = time.perf_counter()
        process = self.context.Process(target=run_tests, args=(str(self.tree), tests, str(self.log), seconds, chosen))
        process.start()
        # what waits for itself takes no processor time
        process.join(60 * seconds)
        ended = not process.is_alive()
        if not ended:
            process.kill()
            process.join()
        said = self.log.read_text(errors="replace")[-1500:]
        if ended and process.exitcode in (4, 5):
            raise RuntimeError(f"pytest could not run {', '.join(tests)}:\n{said}")
        outcome = "passed" if process.exitcode == 0 else "timeout" if not ended or process.exitcode < 0 else "failed"
        return outcome, time.perf_counter() - started, said

    def try_out(self, mutant: Mutant) -> tuple[str, float, str]:
        path = self.tree / mutant.module
        source = path.read_text()
        try:
            path.write_text(mutated(source, f"core/{mutant.operator}", mutant.occurrence))
            found = self.run(PARTS[mutant.module], SECONDS)
            if found[0] == "passed" and mutant.module in SLOWER:
                found = self.run(SLOWER[mutant.module], SECONDS, "")
            return found
        finally:
            path.write_text(source)


def check(worker: Worker) -> None:
    """Raises SystemExit where a test fails without any mutant."""
    everything = sorted({name for tests in (*PARTS.values(), *SLOWER.values()) for name in tests})
    outcome, seconds, said = worker.run(everything, 10 * SECONDS, "")
    if outcome != "passed":
        raise SystemExit(f"The tests fail without any mutant:\n{said}")
    print(f"all tests without a mutant: {seconds:.1f} s", flush=True)


def run_all(sample: list[Mutant], workers: list[Worker], report) -> None:
    """Every mutant in whichever worker is free; report(mutant, outcome, seconds, text) is called as they end."""
    waiting, lock = queue.Queue(), threading.Lock()
    for mutant in sample:
        waiting.put(mutant)

    def work(worker: Worker) -> None:
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            found = worker.try_out(mutant)
            with lock:
                report(mutant, *found)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def summary(rows: list[dict]) -> str:
    """Killed and drawn, by module and together, and the survivors."""
    lines = ["| module | drawn | killed | |", "|---|---|---|---|"]
    for module in [*PARTS, ""]:
        mine = [row for row in rows if row["module"] == (module or row["module"])]
        killed = sum(row["outcome"] != "passed" for row in mine)
        lines.append(f"| {module or 'all'} | {len(mine)} | {killed} | {100 * killed / max(1, len(mine)):.1f} % |")
    survivors = [f"{row['key']} {row['module']}:{row['line']} {row['operator']}\n  - {row['before']}\n  + {row['after']}"
                 for row in rows if row["outcome"] == "passed"]
    return "\n".join([*lines, "", *survivors])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=240, help="mutants to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="copies of the tree, which work at the same time")
    parser.add_argument("--out", type=Path, default=Path("mutation.json"), help="where each result is written as it comes (%(default)s)")
    parser.add_argument("--again", type=Path, help="results of an earlier run: try what survived, and what was not drawn then")
    parser.add_argument("--unchecked", action="store_true", help="begin without a run of the tests that has no mutant in it")
    parser.add_argument("--list", action="store_true", help="name the sample and run nothing")
    options = parser.parse_args(arguments)
    sample = draw(options.count, options.seed)
    if options.list:
        print("\n".join(f"{one.key} {one.module}:{one.line} {one.operator}\n  - {one.before}\n  + {one.after}" for one in sample))
        return 0
    rows = {}
    if options.again:
        known = {row["key"]: row for row in json.loads(options.again.read_text())}
        rows = {one.key: known[one.key] | asdict(one) for one in sample
                if one.key in known and known[one.key]["after"] == one.after and known[one.key]["outcome"] != "passed"}

    def report(mutant: Mutant, outcome: str, seconds: float, said: str) -> None:
        rows[mutant.key] = asdict(mutant) | {"outcome": outcome, "seconds": round(seconds, 1), "said": said}
        ordered = sorted(rows.values(), key=lambda row: (row["module"], row["line"], row["key"]))
        options.out.write_text(json.dumps(ordered, indent=1))
        print(f"{len(rows)}/{len(sample)} {outcome:<8}{seconds:6.1f} s  {mutant.module}:{mutant.line} {mutant.after}", flush=True)

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="qvg-mutation-") as folder:
        workers = [Worker(Path(folder) / str(number), context) for number in range(options.workers)]
        if not options.unchecked:
            check(workers[0])
        run_all([one for one in sample if one.key not in rows], workers, report)
    print(summary(sorted(rows.values(), key=lambda row: (row["module"], row["line"], row["key"]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env bash
# Everything that needs a GPU, in one command: kernel tests on the device, then the benchmarks. No network and no ComfyUI are needed.
#   benchmarks/on_gpu.sh OUT [WHEELS]
# OUT receives tests.log, log.txt, results.md and JSON files; WHEELS is a folder of wheels to compare with (see benchmarks/README.md).
# PYTHON is the interpreter that has torch and triton. Each part has a time limit of its own, so that a slow one does not cost the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
home=$(mktemp -d)
ln -s "$PWD" "$home/comfyui_qvg"
export PYTHONPATH=$home PYTHONUNBUFFERED=1
if [ -n "${2:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$home/site" "$2"/*.whl && PYTHONPATH=$home:$home/site
fi
# not through `qvg`, whose other commands need a video encoder
bench() {
    timeout "$1" "$python" -c "import sys, importlib; importlib.import_module('comfyui_qvg.benchmarks.' + sys.argv[1]).main(sys.argv[2:])" \
        "${@:2}" 2>&1 | tee -a "$out/log.txt"
    echo "== $2 ended at ${SECONDS}s"
}

"$python" -c "from comfyui_qvg.qvg import backends; print(*backends.report('cuda'), sep='\n')"
# the kernels of different tests compile side by side
"$python" -m pytest -q --collect-only tests/test_kernels.py tests/test_kernels_decode.py tests/test_kernels_project.py \
    tests/test_kernels_transform.py tests/test_kernels_attend.py tests/test_backends.py tests/test_offload.py | grep :: |
    timeout "${TESTS_LIMIT:-120}" xargs -d '\n' -n 6 -P "$(nproc)" "$python" -m pytest -q --tb=short >"$out/tests.log" 2>&1
echo "== tests ended at ${SECONDS}s with $?: $(grep -Eo '[0-9]+ passed' "$out/tests.log" | awk '{n += $1} END {print n}') passed"
grep -E "^(FAILED|ERROR)" "$out/tests.log"

bench 120 quality --patterns 3,3,3 1,3,3 --only balanced smallest tiny "balanced, attention in 8 bits" "tiny, attention in 8 bits" \
    --out "$out/quality"
bench 300 generate --contexts 60 180 --rounds 2 --out "$out"
bench 120 kernels --out "$out"
bench 60 kernels --only tune --out "$out/tune"
bench 60 kernels --only tune-attend --out "$out/tune-attend"
bench 60 generate --contexts 21 120 --rounds 2 --limits 24 --out "$out/more"
bench 180 generate --model longcat --out "$out/longcat"
bench 120 generate --model hy-worldplay-8b --out "$out/worldplay"
bench 60 generate --model hy-worldplay-5b --out "$out/worldplay"
find "$out" -name "*.md" ! -name results.md -exec cat {} + >"$out/results.md"
find "$out" -name "*.md" ! -name results.md -delete
echo "== all ended at ${SECONDS}s"

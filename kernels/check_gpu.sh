#!/bin/sh
# On a GPU, with the library built: every check of the kernels, then their speed.
# kernels/check_gpu.sh [PYTHON]; exits with 1 where anything failed.
set -u
python=${1:-python3}
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

"$python" -m pytest -m gpu -q -p no:cacheprovider --durations=5 --tb=short --maxfail=25 \
	tests/test_kernels_gpu.py tests/test_gpu.py || status=1
timeout 150 "$python" -m shadowkv_cli.bench.op_speed || status=1
if command -v "${COMPUTE_SANITIZER:-compute-sanitizer}" >/dev/null; then
	timeout 200 kernels/sanitize.sh "$python" || status=1
fi
exit $status

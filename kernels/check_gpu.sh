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
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
if command -v "$sanitizer" >/dev/null; then
	for tool in memcheck racecheck; do
		found=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 "$sanitizer" --tool $tool \
			--error-exitcode 1 --kernel-regex kns=shadowkv \
			"$python" -m shadowkv_cli.ops.exercise 2>&1) || status=1
		echo "$tool:"
		echo "$found" | tail -n 15
	done
fi
exit $status

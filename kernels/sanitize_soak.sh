#!/bin/sh
# Let compute-sanitizer watch whole decode steps, lanes beside each other, on a GPU: one line a pass.
# kernels/sanitize_soak.sh [PYTHON]; SOAK_CASES of them (4), from SOAK_SEED (0) on. Exits with 1 where
# a pass found something, or is not there.
set -u
python=${1:-python3}
cd "$(dirname "$0")/.."
. kernels/sanitizer.sh
status=0

# NAME TOOL [OPTION...]: the options are the soak's.
pass() {
	name=$1 tool=$2
	shift 2
	"$sanitizer" --tool "$tool" --error-exitcode 1 --kernel-regex kns=shadowkv \
		"$python" -m shadowkv_cli.bench.soak --size small --steps 6 \
		--cases "${SOAK_CASES:-4}" --seed "${SOAK_SEED:-0}" "$@" >"$logs/$name" 2>&1 || {
		status=1
		cat "$logs/$name"
	}
	found=$(grep -E 'SUMMARY|no failure|^FAILED' "$logs/$name" | sed 's/^=* *//' | paste -s -d ';' -)
	echo "$name: ${found:-no summary}"
}

# Every tensor in memory of its own, so that reading beyond it is seen; a graph cannot have that.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
pass memcheck memcheck --no-graph
unset PYTORCH_NO_CUDA_MEMORY_CACHING
# As it really runs: memory that is used again, steps in graphs.
pass memcheck-in-graphs memcheck
pass racecheck-in-graphs racecheck
exit $status

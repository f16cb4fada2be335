#!/bin/sh
# Let compute-sanitizer watch every op on small cases, on a GPU: one line a tool, all where it failed.
# kernels/sanitize.sh [PYTHON]; exits with 1 where a tool found something, or is not there.
set -u
python=${1:-python3}
cd "$(dirname "$0")/.."
. kernels/sanitizer.sh
# Every tensor in memory of its own, so that reading beyond it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

watch() {
	"$sanitizer" --tool "$1" --error-exitcode 1 --kernel-regex kns=shadowkv \
		"$python" -m shadowkv_cli.ops.exercise >"$logs/$1" 2>&1
	echo $? >"$logs/$1.status"
}

began=$(date +%s)
# Beside each other: most of their time is the host's.
watch memcheck &
watch racecheck &
wait
status=0
for tool in memcheck racecheck; do
	if [ "$(cat "$logs/$tool.status")" != 0 ]; then
		status=1
		cat "$logs/$tool"
	fi
	found=$(grep -E 'SUMMARY|^ran ' "$logs/$tool" | sed 's/^=* *//' | paste -s -d ';' -)
	echo "$tool: ${found:-no summary}"
done
echo "both in $(($(date +%s) - began)) s"
exit $status

# For sanitize.sh and sanitize_soak.sh, from the project's root: `sanitizer`, the program, and `logs`, a
# folder that goes at the end. Exits with 1 where there is no such program.
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
if ! command -v "$sanitizer" >/dev/null; then
	echo "There is no $sanitizer here: install the CUDA toolkit, or set COMPUTE_SANITIZER." >&2
	exit 1
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# What racecheck cannot watch: it takes blocks of a cluster that meet at barriers in memory, as those of
# select_in_cluster do, for blocks that never meet, whatever fences they use. memcheck watches them too.
# Against races there are tests of planes beside each other, and the soak.
exclusions() {
	[ "$1" = racecheck ] && echo "--kernel-regex-exclude kns=select_in_cluster"
}

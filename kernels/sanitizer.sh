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

#!/bin/sh
# Compile the kernels into shadowkv_cli/shadowkv_kernels.so: kernels/build.sh PYTHON
#
# PYTHON is one that has torch. nvcc and cmake come from the PATH, else from the Python packages of
# the extra `kernels` beside it. CUDACXX names another nvcc, JOBS how many files are compiled at a
# time, SHADOWKV_ARCHITECTURES other architectures, as CMake writes them.
set -eu
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:$(dirname "$python")
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13

compiler=${CUDACXX:-$(command -v nvcc || true)}
if [ -z "$compiler" ] && [ -x "$packages/bin/nvcc" ]; then
	compiler=$packages/bin/nvcc
	# The packages call it lib, where nvcc looks for lib64.
	export LIBRARY_PATH="$packages/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
fi
if [ -z "$compiler" ] || ! command -v cmake >/dev/null; then
	echo "nvcc and cmake are needed: $python -m pip install '.[kernels]' brings both" >&2
	exit 1
fi
cmake -S "$root/kernels" -B "$root/build/kernels" -DCMAKE_BUILD_TYPE=Release \
	-DPython_EXECUTABLE="$python" -DCMAKE_CUDA_COMPILER="$compiler" \
	-DSHADOWKV_ARCHITECTURES="${SHADOWKV_ARCHITECTURES:-}"
cmake --build "$root/build/kernels" --parallel "${JOBS:-2}"
cmake --install "$root/build/kernels"

#!/usr/bin/env bash
# Build the wheel from the sdist, install it into a new environment outside the checkout, and test it there.
# The environment sees the packages of the given Python, but not its editable install: a path in a .pth file
# is not searched for .pth files.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME

"$python" -m build --no-isolation --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 ||
  { cat "$work/build.log"; exit 1; }
ls -l "$work"/dist

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --quiet --python "$work/venv/bin/python" install --no-deps --no-index "$work"/dist/*.whl
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$packages" >"$("$work/venv/bin/python" -c "$packages")/dependencies.pth"

mkdir "$work/tests"
cp "$root"/tests/{conftest,test_installed,test_store,test_splits}.py "$work/tests"
if [ -z "${BRAINALIGN_MIRROR:-}" ] && [ -d "$root/../shared/data" ]; then
  export BRAINALIGN_MIRROR="$root/../shared/data"
fi
cd "$work/tests"
export PATH="$work/venv/bin:$PATH"
python -c 'import sys, brainalign; assert brainalign.__file__.startswith(sys.prefix), brainalign.__file__'
python -m pytest -c "$root/pyproject.toml" --rootdir "$work/tests" -p no:cacheprovider "$work/tests"

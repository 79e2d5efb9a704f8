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

# Every tracked file of the package and of the workflow is in the wheel.
if [ -e "$root/.git" ]; then
  git -C "$root" ls-files brainalign Snakefile workflows configs |
    sed -E 's,^(Snakefile|workflows/|configs/),brainalign/_workflow/\1,' | sort >"$work/tracked"
  "$python" -m zipfile -l "$work"/dist/*.whl | awk 'NR > 1 { print $1 }' | sort >"$work/shipped"
  missing=$(comm -23 "$work/tracked" "$work/shipped")
  if [ -n "$missing" ]; then
    printf 'Tracked, but not in the wheel:\n%s\n' "$missing" >&2
    exit 1
  fi
fi

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

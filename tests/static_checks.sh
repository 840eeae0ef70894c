#!/bin/sh
# Types and import contracts, against an installed copy: static tools do not see through the folder mapping.
set -eu
bin=$(cd "$1" && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy" build' EXIT
"$bin/pip" install --quiet --no-deps --no-build-isolation --target "$copy" .
cp pyproject.toml "$copy/"
cd "$copy"
PYTHONPATH="$copy" "$bin/lint-imports" pyproject.toml --no-cache
"$bin/mypy" --config-file pyproject.toml --cache-dir "$copy/.mypy" -p clplat

#!/usr/bin/env bash
# Runs the tests with the oldest releases that pyproject.toml allows, in a fresh environment (3 GB):
#     bash tests/oldest.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
. "$environment/bin/activate"
sed -nE 's/^ *"([A-Za-z0-9_.-]+(\[[a-z]+\])?)>=([0-9.]+)".*/\1==\3/p' pyproject.toml | sort -u > "$environment/oldest.txt"
pip install --quiet -e . -r "$environment/oldest.txt"
python -m pytest -q "$@"

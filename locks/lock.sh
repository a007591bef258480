#!/usr/bin/env bash
# Versions and digests of everything in the images but Ratchet itself, from pyproject.toml: `make lock`, after a change of
# dependencies and for updates. What pip has been told of a folder of wheels holds here, too; PyTorch's builds for
# processors are only in its own index.
set -euo pipefail
cd "$(dirname "$0")/.."
uv="$1"
extras=(--extra local --extra postgres --extra registry --extra s3 --extra traces)
options=(--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --quiet --upgrade
  --no-emit-package ratchet-client)
source=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ -z "${PIP_FIND_LINKS:-}" ] || source=(--find-links "$PIP_FIND_LINKS")
"$uv" pip compile pyproject.toml "${extras[@]}" --extra vlm-cpu "${options[@]}" "${source[@]}" --output-file locks/cpu.txt
"$uv" pip compile pyproject.toml "${extras[@]}" --extra gpu "${options[@]}" --output-file locks/gpu.txt

#!/usr/bin/env bash
# Versions and digests of everything in the images but Ratchet itself, from pyproject.toml: `make lock`, after a change of
# dependencies and for updates. Where two locks have the same package, they have the same version, so that images share
# layers. What pip has been told of a folder of wheels holds here, too; PyTorch's builds for processors are only in its
# own index.
set -euo pipefail
cd "$(dirname "$0")/.."
uv="$1"
lock() { # FILE, then words for uv
  "$uv" pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --quiet \
    --upgrade --no-emit-package ratchet-client --output-file "locks/$1" "${@:2}"
}
extras=(--extra postgres --extra registry --extra s3 --extra traces)
source=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ -z "${PIP_FIND_LINKS:-}" ] || source=(--find-links "$PIP_FIND_LINKS")
without() { printf '%s\n' "$@"; }

# Triton's kernels are for GPUs, and xgrammar, which wants it, has others for processors.
lock cpu.txt pyproject.toml "${extras[@]}" --extra local --extra vlm-cpu --excludes <(without triton) "${source[@]}"
# What ingest, maintain and console do not import (tests/unit/ops/test_layers.py).
lock slim.txt pyproject.toml "${extras[@]}" --constraints locks/cpu.txt \
  --excludes <(without faiss-cpu num2words open-clip-torch peft ray timm torch torchvision transformers)
lock gpu.txt pyproject.toml "${extras[@]}" --extra local --extra gpu --constraints locks/slim.txt
lock build.txt - <<<$'cyclonedx-bom\nsetuptools>=77' # builds Ratchet's wheels; writes the SBOM

#!/bin/sh
# In an image that has the packages of its lock: installs Ratchet, and writes the SBOM (CycloneDX) of all that is there.
# /mnt is the stage `wheels` of the Dockerfile.
set -eu
pip install --no-index --no-deps --no-cache-dir /mnt/wheels/*.whl
mkdir -p /usr/local/share/ratchet
/mnt/build/bin/python -m cyclonedx_py environment --output-format JSON \
  --output-file /usr/local/share/ratchet/sbom.cdx.json "$(command -v python)"

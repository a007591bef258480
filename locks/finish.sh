#!/bin/sh
# In an image, after everything of a lock is installed: Ratchet itself with its client, and the SBOM (CycloneDX) of what is there.
set -eu
pip install --no-deps --no-cache-dir ./client .
pip install --no-cache-dir --target /tmp/sbom cyclonedx-bom==7.5.0
mkdir -p /usr/local/share/ratchet
PYTHONPATH=/tmp/sbom python -m cyclonedx_py environment --output-format JSON \
  --output-file /usr/local/share/ratchet/sbom.cdx.json "$(command -v python)"
rm -rf /tmp/sbom

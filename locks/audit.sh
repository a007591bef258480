#!/usr/bin/env bash
# Known vulnerabilities of the packages in the images: `make audit`, which CI runs. Asks OSV (https://osv.dev), and is
# left out where that cannot be reached.
set -euo pipefail
cd "$(dirname "$0")"
if ! curl --silent --max-time 10 --output /dev/null https://api.osv.dev/v1/vulns/GHSA-2g68-c3qc-8985; then
  echo "audit: left out, api.osv.dev cannot be reached"
  exit
fi
status=0
for lock in slim cpu gpu build; do
  "$1" tool run pip-audit==2.10.1 --vulnerability-service osv --disable-pip --require-hashes --requirement $lock.txt || status=1
done
exit $status

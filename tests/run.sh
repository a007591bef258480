#!/usr/bin/env bash
# All checks and tests. Linters, types, unit tests and the updater's tests need a processor, the others mostly wait for
# servers to start: so they run beside each other. What the first say is shown when they are done.
set -uo pipefail
bin="$1"
updater=tests/integration/updater
said="$(mktemp)"
trap 'rm -f "$said"' EXIT
{ "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy" && "$bin/lint-imports" && nice -n 5 "$bin/pytest" tests/unit "$updater"; } >"$said" 2>&1 &
units=$!
trap 'kill "$units" 2>/dev/null; exit 130' INT TERM
"$bin/pytest" tests/e2e tests/integration --ignore "$updater"
rest=$?
wait "$units"
unit=$?
cat "$said"
[ "$unit" -eq 0 ] && [ "$rest" -eq 0 ]

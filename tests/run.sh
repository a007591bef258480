#!/usr/bin/env bash
# All checks and tests. Linters, types, unit tests and the updater's tests need a processor, the others mostly wait for
# servers to start: so they run beside each other, the first in a session of low priority (Linux shares processors out
# by session, see sched(7)). What they say is shown when they are done.
set -uo pipefail
bin="$1"
updater=tests/integration/updater
if [ "${2:-}" = beside ]; then
  { echo 10 >/proc/self/autogroup; } 2>/dev/null
  "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy" && "$bin/lint-imports" &&
    nice -n 10 "$bin/pytest" tests/unit "$updater"
  exit
fi
said="$(mktemp)"
trap 'rm -f "$said"' EXIT
setsid bash "$0" "$bin" beside >"$said" 2>&1 &
beside=$!
trap 'kill -- "-$beside" 2>/dev/null; exit 130' INT TERM
"$bin/pytest" tests/e2e tests/integration --ignore "$updater"
rest=$?
wait "$beside"
first=$?
cat "$said"
[ "$first" -eq 0 ] && [ "$rest" -eq 0 ]

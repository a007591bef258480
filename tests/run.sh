#!/usr/bin/env bash
# All checks and tests, in three strands: what mostly waits for servers to start; beside it, in a session of low
# priority (Linux shares processors out by session, see sched(7)), linters, types and unit tests; and the tests of the
# updater and of the stream, which wait for processes, brokers and files. What the last two say is shown when all are
# done. Of low priority, they have longer limits: beside other work on the same cores, what takes 10 s alone took more
# than 120.
set -uo pipefail
bin="$1"
waiting=(tests/integration/updater tests/integration/streams)
limit=600
if [ "${2:-}" = beside ]; then
  { echo 10 >/proc/self/autogroup; } 2>/dev/null
  nice -n 10 "$bin/pytest" --timeout "$limit" "${waiting[@]}" >"$3" 2>&1 &
  "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy" && "$bin/lint-imports" &&
    nice -n 10 "$bin/pytest" --timeout "$limit" tests/unit
  unit=$?
  wait "$!" && exit "$unit"
  exit 1
fi
said="$(mktemp -d)"
trap 'rm -rf "$said"' EXIT
setsid bash "$0" "$bin" beside "$said/waiting" >"$said/unit" 2>&1 &
beside=$!
trap 'kill -- "-$beside" 2>/dev/null; exit 130' INT TERM
"$bin/pytest" tests/e2e tests/integration "${waiting[@]/#/--ignore=}"
rest=$?
wait "$beside"
first=$?
cat "$said/waiting" "$said/unit"
[ "$first" -eq 0 ] && [ "$rest" -eq 0 ]

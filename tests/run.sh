#!/usr/bin/env bash
# All checks and tests but the long ones. What mostly waits for servers to start has the terminal; beside it run the
# other jobs, first those that take or wait longest, in a session of low priority (Linux shares processors out by
# session, see sched(7)): four at a time, since each grows to 3 GB. What these say is shown when all are done, and what
# failed anywhere is named once more at the end. Of low priority, they have longer limits: beside other work on the same
# cores, what takes 10 s alone took more than 120.
#
# Each process computes on one thread: models are tiny, and threads of several processes that wait for each other on two
# cores spin.
set -uo pipefail
export OMP_NUM_THREADS=1
bin="$1"
chosen=(-m "not long" --durations 15 --durations-min 5)
servers=(tests/integration/console tests/integration/serving tests/e2e)
alone=(tests/integration/serving/test_{openapi,bodies,searches}.py) # start no server
named=("${servers[@]}" tests/integration/{streams,updater})
unit=(tests/unit/{updater,core,ops,serving})
jobs=("tests/integration ${named[*]/#/--ignore=}" "tests/unit/updater ${alone[*]}" "tests/unit/core tests/unit/ops"
  "tests/integration/streams tests/integration/updater tests/outside/kafka" "tests/unit ${unit[*]/#/--ignore=}" tests/unit/serving types)
if [ "${2:-}" = job ]; then
  exec >"$(mktemp "$3/XXXXXX")" 2>&1
  if [ "$4" = types ]; then
    "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy" && "$bin/lint-imports"
  else
    read -ra words <<<"$4"
    "$bin/pytest" --timeout 600 "${chosen[@]}" "${words[@]}"
  fi
  exit
fi
if [ "${2:-}" = beside ]; then
  { echo 10 >/proc/self/autogroup; } 2>/dev/null
  printf '%s\0' "${jobs[@]}" | nice -n 10 xargs -0 -n 1 -P 4 bash "$0" "$bin" job "$3"
  exit
fi
said="$(mktemp -d)"
trap 'rm -rf "$said"' EXIT
setsid bash "$0" "$bin" beside "$said" &
beside=$!
trap 'kill -- "-$beside" 2>/dev/null; exit 130' INT TERM
"$bin/pytest" "${chosen[@]}" "${servers[@]}" "${alone[@]/#/--ignore=}" 2>&1 | tee "$said/servers"
first=${PIPESTATUS[0]}
wait "$beside"
others=$?
find "$said" -type f ! -name servers -exec cat {} +
grep -rhE '^(FAILED|ERROR) |: error: ' "$said"
[ "$first" -eq 0 ] && [ "$others" -eq 0 ]

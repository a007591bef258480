# shellcheck shell=bash disable=SC2034
# Sourced by the other scripts: settings, and functions that run commands on the node.
set -euo pipefail
fail() { echo "$0: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "run as root"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ratchet-tests
dir=$(realpath -m "${OUTSIDE:-$cache/kubernetes}")  # binaries, images, and the state of the cluster
case $dir/ in "$here"/* | /run/* | /var/lib/* | /var/log/*) # the node has a /run, /var/lib and /var/log of its own
  fail "OUTSIDE=$dir must be outside of $here, /run, /var/lib and /var/log" ;;
esac
bin=$dir/bin img=$dir/img run=$dir/run
ns=ml
address=10.99.0.1 pods=10.98.0.0/24  # of the node, which sees this machine as 10.99.0.2, and of its pods
services=10.97.0.0/16 api_service=10.97.0.1 dns_service=10.97.0.10

export KUBECONFIG=$run/admin.conf PATH=$bin:$PATH
export no_proxy="${no_proxy:+$no_proxy,}$address"
export NO_PROXY=$no_proxy

checkout() { # sets $source, a checkout of the project with .venv, and $python, the CPython that .venv is made from
  source=$(realpath "$here/../../../..")
  [ -x "$source/.venv/bin/ratchet" ] || fail "$source has no .venv: make test makes it"
  python=$("$source/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')
  [ "$python" != /usr ] || fail "$source/.venv uses /usr/bin/python; make it from a CPython with its own prefix (uv, pyenv)"
}

filled() { # prints manifests with their @NAMES@ filled in; after checkout
  (cd "$here/manifests" && sed "s,@SOURCE@,$source,g; s,@PYTHON@,$python,g; s,@NS@,$ns,g
    s,@NODE@,$address,g; s,@DNS@,$dns_service,g" "$@")
}

alive() { # whether the node runs: its first process is pause
  local pid; pid=$(cat "$run/node.pid" 2>/dev/null) && [[ $(readlink "/proc/$pid/exe") == "$bin/pause"* ]]
}

inside() { # runs a command in the node's namespaces
  alive || fail "the node does not run: start.sh"
  nsenter --all --target "$(cat "$run/node.pid")" -- "$@"
}

start() { # NAME COMMAND...: runs a command in the background on the node, unless it runs already; logs to run/log/NAME.log
  alive || fail "the node does not run: start.sh"
  if [ -f "$run/$1.pid" ] && kill -0 "$(cat "$run/$1.pid")" 2>/dev/null; then return; fi
  setsid nsenter --all --target "$(cat "$run/node.pid")" -- "${@:2}" >> "$run/log/$1.log" 2>&1 < /dev/null &
  echo $! > "$run/$1.pid"
}

await() { # repeats a command for up to 2 minutes, until it succeeds
  for _ in $(seq 240); do
    if "$@" > /dev/null 2>&1; then return; fi
    sleep 0.5
  done
  fail "2 minutes without success: $*"
}

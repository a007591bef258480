#!/usr/bin/env bash
# Debian packages that the tests use beside Python: PostgreSQL, Chromium (the console's visitor), Prometheus and
# Alertmanager. Java and Maven, for Apache Kafka, are installed where that can be done here; without them the tests that
# need it are skipped.
set -euo pipefail
missing=()
command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
command -v chromium >/dev/null || missing+=(chromium)
{ command -v prometheus && command -v promtool; } >/dev/null || missing+=(prometheus)
command -v prometheus-alertmanager >/dev/null || missing+=(prometheus-alertmanager)
wanted=("${missing[@]}")
command -v java >/dev/null || wanted+=(default-jre-headless)
command -v mvn >/dev/null || wanted+=(maven)
[ ${#wanted[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  [ ${#missing[@]} -eq 0 ] && exit 0
  echo "install ${missing[*]} first, e.g. sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing ${wanted[*]}"
apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null 2>&1 || {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
}

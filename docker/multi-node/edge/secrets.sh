#!/bin/sh
# Makes secrets/: an API key for each client named (default: agents) and a Grafana password. What exists is kept.
# They are mounted as files; none is in a command line, an image or this bundle's configuration.
set -eu
cd "$(dirname "$0")/.."
umask 077
mkdir -p secrets
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
echo '*' > secrets/.gitignore
touch secrets/api_keys secrets/hf_token secrets/alert_webhook_url
for client in "${@:-agents}"; do
    grep -q "^$client " secrets/api_keys || echo "$client $(random)" >> secrets/api_keys
done
[ -s secrets/grafana_password ] || random > secrets/grafana_password
[ -s secrets/router_key ] || printf 'sk-%s' "$(random)" > secrets/router_key # between NGINX and LiteLLM, where there is one
# The folder is closed to others on this host; the files are read by the containers' own users.
chmod 700 secrets
find secrets -maxdepth 1 -type f -exec chmod 644 {} +
echo "secrets/api_keys: $(wc -l < secrets/api_keys) client(s); a gated model needs a token in secrets/hf_token"

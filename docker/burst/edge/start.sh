#!/bin/sh
# Starts the edge: keys from the secret into a map that only this container sees, then NGINX, then the watch over its
# engines. EDGE_CONF, EDGE_RUN and EDGE_SECRETS move the folders, so that it also runs outside a container.
set -eu
CONF=${EDGE_CONF:-/etc/edge}
RUN=${EDGE_RUN:-/run/edge}
SECRETS=${EDGE_SECRETS:-/run/secrets}
export EDGE_CONF="$CONF" EDGE_RUN="$RUN"
umask 077
mkdir -p "$RUN/state"
cp "$CONF"/*.conf "$RUN/"
[ ! -f "$SECRETS/tls.crt" ] || cp "$SECRETS/tls.crt" "$SECRETS/tls.key" "$RUN/"

# One client a line: NAME KEY. Letters, digits, dot, dash and underscore only, so that no line can add a directive.
: > "$RUN/keys.map"
while read -r name key more; do
    case "$name" in '' | '#'*) continue ;; esac
    case "$name$key" in
        *[!A-Za-z0-9._-]*)
            echo "api_keys: client $name: only letters, digits, dot, dash and underscore are allowed" >&2
            exit 1
            ;;
    esac
    if [ "${#key}" -lt 32 ] || [ -n "$more" ]; then
        echo "api_keys: client $name: a line is NAME KEY, the key of 32 characters or more" >&2
        exit 1
    fi
    printf '"Bearer %s" "%s";\n' "$key" "$name" >> "$RUN/keys.map"
done < "$SECRETS/api_keys"
if [ ! -s "$RUN/keys.map" ]; then
    echo "api_keys: no key; the edge does not start without one" >&2
    exit 1
fi

if [ -f "$SECRETS/router_key" ]; then printf '"~." "Bearer %s";\n' "$(cat "$SECRETS/router_key")" > "$RUN/upstream_key.map"; fi

if [ "${1:-}" = reload ]; then # start.sh reload: the changed files, old workers end their streams
    sh "$CONF/watch.sh" once
    exec nginx -p "$RUN" -c "$RUN/nginx.conf" -s reload
fi
rm -f "$RUN"/home-*.sock # of an NGINX that was killed
sh "$CONF/watch.sh" once
sh "$CONF/watch.sh" &
exec nginx -p "$RUN" -c "$RUN/nginx.conf" -g 'daemon off;'

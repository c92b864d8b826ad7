#!/bin/sh
# Keeps only engines that answer in the upstreams: asks each one's health page, rewrites servers-*.conf, reloads.
# Two failures in a row take an engine out, one success brings it back. `drain.sh` takes one out by hand.
set -eu
CONF=${EDGE_CONF:-/etc/edge}
RUN=${EDGE_RUN:-/run/edge}
umask 077

ask() { # PEER HEALTH-PATH: counts its failures in a row
    failures=0
    [ ! -f "$RUN/state/$1" ] || failures=$(cat "$RUN/state/$1")
    if curl -fs -m 3 -o /dev/null "http://$1$2"; then failures=0; else failures=$((failures + 1)); fi
    echo "$failures" > "$RUN/state/$1.new"
    mv "$RUN/state/$1.new" "$RUN/state/$1"
}

serves() { [ ! -f "$RUN/state/$1.drain" ] && [ "$(cat "$RUN/state/$1")" -lt "$2" ]; }

resolves() { # NGINX does not start with a name that nobody knows
    case "${1%:*}" in *[!0-9.]*) getent hosts "${1%:*}" > /dev/null ;; esac
}

write() { # FILE LIMIT: the lines of its engines that serve
    : > "$RUN/next"
    while read -r word peer rest; do
        if serves "$peer" "$2" && resolves "$peer"; then echo "$word $peer $rest" >> "$RUN/next"; fi
    done < "$CONF/$1"
}

homes() { # sticky-round-robin: for each engine in turn a page that names its upstream, whose backups are the others
    : > "$RUN/turns.conf"
    : > "$RUN/homes.conf"
    number=0
    while read -r word peer rest; do
        home="home-$number" own=${rest%%;*}
        number=$((number + 1))
        if grep -qF "server $peer " "$RUN/servers-engines.conf"; then
            weight=$(expr "$own" : '.*\(weight=[0-9]*\)' || true)
            echo "server unix:$RUN/$home.sock $weight;" >> "$RUN/turns.conf"
            echo "server { listen unix:$RUN/$home.sock backlog=16384; access_log off; location / { add_header X-Home $home; return 204; } }"
            echo "upstream $home { server $peer $own;"
            grep -vF "server $peer " "$RUN/servers-engines.conf" | sed 's/;.*/ backup;/' || true
        else # sessions that it had
            echo "upstream $home { hash \$affinity consistent; include servers-engines.conf;"
        fi >> "$RUN/homes.conf"
        echo "keepalive 256; keepalive_requests 10000; keepalive_timeout 4s; }" >> "$RUN/homes.conf"
    done < "$CONF/servers-engines.conf"
}

limit=2
[ "${1:-}" != once ] || limit=1
while :; do
    cat "$CONF"/servers-*.conf > "$RUN/all"
    while read -r _ peer rest; do ask "$peer" "${rest##*# }" & done < "$RUN/all"
    wait
    changed=
    for path in "$CONF"/servers-*.conf; do
        file=${path##*/}
        write "$file" "$limit"
        # None answers: keep those that have a name, so that the first one up is found; else say 502.
        [ -s "$RUN/next" ] || write "$file" 1000000000
        [ -s "$RUN/next" ] || echo "server 127.0.0.1:1;" > "$RUN/next"
        if ! cmp -s "$RUN/next" "$RUN/$file"; then
            cp "$RUN/next" "$RUN/$file"
            changed="$changed $file"
        fi
    done
    if [ -n "$changed${1:-}" ] && grep -q '^ *include homes' "$RUN/nginx.conf"; then homes; fi
    [ "${1:-}" != once ] || exit 0
    if [ -n "$changed" ]; then
        echo "engines changed:$changed" >&2
        nginx -p "$RUN" -c "$RUN/nginx.conf" -s reload || echo "reload refused, the old servers stay" >&2
    fi
    sleep 2
    kill -0 "$(cat "$RUN/nginx.pid" 2> /dev/null)" 2> /dev/null || exit 0 # no NGINX, nothing to watch
done

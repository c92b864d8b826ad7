#!/bin/sh
# drain.sh NAME:PORT        no new requests for this engine; those in flight end
# drain.sh NAME:PORT back   it serves again
set -eu
RUN=${EDGE_RUN:-/run/edge}
if [ "${2:-}" = back ]; then rm -f "$RUN/state/$1.drain"; else : > "$RUN/state/$1.drain"; fi

#!/bin/sh
# keys.sh EDGE_ADDRESS: WireGuard keys of the edge and of each machine, into secrets/hosts: wg0.conf for this host and
# one cloud-init file per machine. Keys that exist are kept. Needs wireguard-tools.
set -eu
edge=${1:?give the public address of this host}
cd "$(dirname "$0")/.."
umask 077
mkdir -p secrets/hosts

public() { # NAME: its public key, made once
    [ -s "secrets/hosts/$1.key" ] || wg genkey > "secrets/hosts/$1.key"
    wg pubkey < "secrets/hosts/$1.key"
}

peer() { # NAME ADDRESS POOL
    key=$(public "$1")
    printf '[Peer]\nPublicKey = %s\nAllowedIPs = %s/32\n' "$key" "$2" >> secrets/hosts/wg0.conf
    sed -e "s|@ADDRESS@|$2|" -e "s|@EDGE@|$edge|" -e "s|@EDGE_PUBLIC_KEY@|$edge_key|" \
        -e "s|@PRIVATE_KEY@|$(cat "secrets/hosts/$1.key")|" "hosts/$3.cloud-init.yaml" > "secrets/hosts/$1.yaml"
}

edge_key=$(public edge)
printf '[Interface]\nAddress = 10.77.0.1/24\nListenPort = 51820\nPrivateKey = %s\n' \
    "$(cat secrets/hosts/edge.key)" > secrets/hosts/wg0.conf
peer small-0 10.77.0.11 small
peer small-1 10.77.0.12 small
peer small-2 10.77.0.13 small
peer small-3 10.77.0.14 small
peer small-4 10.77.0.15 small
peer small-5 10.77.0.16 small
peer small-6 10.77.0.17 small
echo "secrets/hosts: install wg0.conf as /etc/wireguard/wg0.conf, start wg-quick@wg0; NAME.yaml is a machine's user data"

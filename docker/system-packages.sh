#!/usr/bin/env bash
# Make sure that the programs Pithead talks to are installed: mosquitto always,
# PostgreSQL and a C compiler for the tests; with the argument `bench`, h2load too. Installs them
# with apt-get where that is permitted.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/usr/local/sbin"
missing=()
command -v mosquitto >/dev/null || missing+=(mosquitto)
if ! command -v initdb >/dev/null && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    missing+=(postgresql)
fi
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
if [ "${1:-}" = bench ]; then
    command -v h2load >/dev/null || missing+=(nghttp2-client)
fi
[ ${#missing[@]} -eq 0 ] && exit 0
echo "Installing ${missing[*]} ..."
if command -v apt-get >/dev/null; then
    run=()
    if [ "$(id -u)" -ne 0 ]; then
        if sudo -n true 2>/dev/null; then run=(sudo -n); else run=(false); fi
    fi
    export DEBIAN_FRONTEND=noninteractive
    # A policy that forbids services to start: Pithead starts its own.
    if "${run[@]}" apt-get update -qq && "${run[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
        exit 0
    fi
fi
echo "Please install ${missing[*]} with your package manager, for example:" >&2
echo "    sudo apt-get install ${missing[*]}" >&2
exit 1

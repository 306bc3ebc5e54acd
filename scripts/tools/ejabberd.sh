#!/usr/bin/env bash
# A cluster of two ejabberd nodes on loopback, to compare with: of the Debian package `ejabberd`, with folders, ports and
# names of their own. docs/benchmarks.md tells how to compare.
#   scripts/tools/ejabberd.sh start DIR   returns when both serve bench.test, on ports 25222 and 25223; pids in DIR/N/pid
#   scripts/tools/ejabberd.sh ctl DIR N ARGUMENTS...   ejabberdctl of node N
#   scripts/tools/ejabberd.sh stop DIR
# Environment: PORT (25222, and the next one), CPUS (list for taskset), EPMD_PORT (24370).
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
[ $# -ge 2 ] || usage
command=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
port=${PORT:-25222}
host=bench.test
cookie=xmppd-bench
# 127.0.0.1 alone, for the nodes and for epmd, which tells them of each other.
export ERL_EPMD_PORT=${EPMD_PORT:-24370} ERL_EPMD_ADDRESS=127.0.0.1 ERL_CRASH_DUMP_BYTES=0
inner=(-setcookie $cookie -noinput -kernel inet_dist_use_interface '{127,0,0,1}')
export ERL_LIBS=${ERL_LIBS:-$(echo /usr/lib/*-linux-gnu)} # where Debian has ejabberd

configuration() { # configuration N
    cat <<END
hosts: ["$host"]
loglevel: warning
certfiles: ["$dir/tls.pem"]
auth_password_format: scram
disable_sasl_mechanisms: ["digest-md5", "x-oauth2"]
registration_timeout: infinity
listen:
  - {port: $((port + $1 - 1)), ip: "127.0.0.1", module: ejabberd_c2s, starttls: true, max_stanza_size: 262144, backlog: 1024}
access_rules: {everybody: [allow: all]}
shaper_rules: {max_user_sessions: [10: all], max_user_offline_messages: [infinity: all]}
modules:
  mod_caps: {}
  mod_disco: {}
  mod_last: {}
  mod_offline: {}
  mod_ping: {}
  mod_private: {}
  mod_register: {access: everybody, access_from: everybody, ip_access: everybody}
  mod_roster: {versioning: true}
  mod_vcard: {search: false}
  mod_version: {}
END
}

ctl() { # ctl N ARGUMENTS...
    local node=bench$1@127.0.0.1
    shift
    HOME=$dir erl -hidden -name "ctl$$-$RANDOM@127.0.0.1" "${inner[@]}" -s ejabberd_ctl -extra "$node" "$@"
}

wait_for() { # wait_for N
    for _ in $(seq 200); do
        if ctl "$1" status >/dev/null 2>&1; then return; fi
        sleep 0.3
    done
    echo "ejabberd.sh: node $1 does not serve; see $dir/$1" >&2
    return 1
}

start() {
    local here pin=()
    [ -z "${CPUS:-}" ] || pin=(taskset -c "$CPUS")
    if [ ! -f "$dir/tls.pem" ]; then
        openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj "/CN=$host" -addext "subjectAltName=DNS:$host" \
            -keyout "$dir/key" -out "$dir/certificate" 2>/dev/null
        cat "$dir/certificate" "$dir/key" >"$dir/tls.pem"
    fi
    setsid epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT" >/dev/null 2>&1 </dev/null &
    echo $! >"$dir/epmd.pid"
    for n in 1 2; do
        here=$dir/$n
        mkdir -p "$here/spool" "$here/log"
        configuration $n >"$here/ejabberd.yml"
        (
            cd "$here/spool"
            ulimit -n "$(ulimit -Hn)"
            export EJABBERD_CONFIG_PATH=$here/ejabberd.yml EJABBERD_LOG_PATH=$here/log/ejabberd.log HOME=$dir
            exec setsid "${pin[@]}" erl -name "bench$n@127.0.0.1" "${inner[@]}" +K true +P 250000 \
                -mnesia dir "\"$here/spool\"" -s ejabberd >"$here/log/out" 2>&1 </dev/null
        ) &
        echo $! >"$here/pid"
        wait_for $n
    done
    if [ "$(ctl 2 list_cluster | wc -l)" -lt 2 ]; then
        ctl 2 join_cluster bench1@127.0.0.1 >>"$dir/2/log/join" 2>&1 || true # it restarts itself, and says little
        for _ in $(seq 100); do
            if [ "$(ctl 2 list_cluster 2>/dev/null | wc -l)" = 2 ]; then break; fi
            sleep 0.3
        done
        wait_for 2
    fi
    ctl 1 list_cluster
}

stop() {
    local pid
    for file in "$dir/2/pid" "$dir/1/pid" "$dir/epmd.pid"; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -9 "$pid" 2>/dev/null || true
        rm -f "$file"
    done
}

case $command in
start) start ;;
stop) stop ;;
ctl) [ $# -ge 4 ] || usage && ctl "${@:3}" ;;
*) usage ;;
esac

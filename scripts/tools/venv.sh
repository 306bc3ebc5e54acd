# shellcheck shell=bash
# Sourced by the scripts one folder up. Sets `root` (the checkout) and offers `prepare`.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
venv=$root/.venv
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout wins over any installed xmppd

say() { printf '%s\n' "$*" >&2; }
die() {
    say "${0##*/}: $*"
    exit 1
}

is_debian() { [ -f /etc/debian_version ] && command -v apt-get >/dev/null; }
is_root() { [ "$(id -u)" = 0 ]; }

# apt PACKAGE...: installs, asking nothing; its own failure is the caller's.
apt() {
    say "installing with apt-get: $*"
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 update >&2 &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
            -o DPkg::Lock::Timeout=300 install "$@" </dev/null >&2
}

# An interpreter that is new enough and can make a virtual environment. Each is run, not only looked up: version
# managers leave commands on the path that only say "not installed".
find_python() {
    local candidate
    newest=
    for candidate in python3.13 python3.12 python3.11 python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        newest=${newest:-$candidate}
        if "$candidate" -c 'import ensurepip, sqlite3, ssl, venv' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

need_python() {
    find_python && return
    find_python >/dev/null || true # again, here: `newest` set in a command substitution would be lost
    local package="python3-venv"
    if [ -n "$newest" ]; then
        package=$("$newest" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if is_debian && is_root && apt "$package" && find_python; then return; fi
        say "${0##*/}: $(command -v "$newest") cannot make virtual environments (its venv, ensurepip, ssl or sqlite3 is missing)."
        say "On Debian and Ubuntu: sudo apt-get install $package"
    else
        say "${0##*/}: Python 3.11 or newer is needed, and none of python3.13, python3.12, python3.11, python3 is."
        say "On Debian 12+ and Ubuntu 24.04+: sudo apt-get install python3 $package"
        say "On Ubuntu 22.04: sudo apt-get install python3.11 python3.11-venv"
    fi
    return 1
}

stamp_of() { # stamp_of LOCKFILE: changes when anything the environment was made from changes
    cat "$root/$1" "$root/pyproject.toml" | cksum
    printf '%s\n' "$root"
}

stamped() { [ "$(cat "$venv/.xmppd-$1" 2>/dev/null)" = "$(stamp_of "$2")" ]; }

install_into_venv() { # install_into_venv NAME LOCKFILE
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install -q --no-warn-script-location)
    say "installing the dependencies of $2 into .venv (once; this takes a minute or so)"
    export PIP_USER=0
    "${pip[@]}" --require-hashes -r "$root/$2" >&2
    # `compat` is a plain path entry: it costs nothing at start, and linters and type checkers understand it.
    "${pip[@]}" --no-deps --no-build-isolation --config-settings editable_mode=compat -e "$root" >&2
    stamp_of "$2" >"$venv/.xmppd-$1.new"
    mv "$venv/.xmppd-$1.new" "$venv/.xmppd-$1" # last: an interrupted installation is not taken for a whole one
}

# prepare run|dev: makes or refreshes .venv and sets `python`. XMPPD_PYTHON names an interpreter that already has the
# dependencies; then nothing is made and nothing installed. Everything but the result goes to standard error.
prepare() {
    if [ -n "${XMPPD_PYTHON:-}" ]; then
        python=$XMPPD_PYTHON
        return
    fi
    python=$venv/bin/python
    if command -v flock >/dev/null; then # two scripts started at once: the second waits for the first
        exec 9<"$root"
        flock 9
    fi
    if ! "$python" -c '' 2>/dev/null || { ! stamped run requirements.lock && ! stamped dev requirements-dev.lock; }; then
        local base
        base=$(need_python) || exit 1
        say "making .venv with $base"
        "$base" -m venv --clear "$venv"
    fi
    if [ "$1" = dev ]; then
        stamped dev requirements-dev.lock || install_into_venv dev requirements-dev.lock
    else
        stamped run requirements.lock || stamped dev requirements-dev.lock || install_into_venv run requirements.lock
    fi
    exec 9<&-
}

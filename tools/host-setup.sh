#!/bin/sh
# Check what the host must have, install what is missing as root, else print the command that does.
#
#   tools/host-setup.sh           prints the Python to use on stdout; all else goes to stderr
#   tools/host-setup.sh fuzz      also wants clang with libFuzzer, which nothing but `make fuzz` needs
#
# Exit 0: everything is there. Exit 2: something is missing and could not be installed; the last lines say what to do.
set -eu

oldest='3, 11'
purpose=${1:-}
missing=''

say() { printf 'vioasid: %s\n' "$*" >&2; }
need() { missing="$missing $*"; }
has() { command -v "$1" >/dev/null 2>&1; }

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < ($oldest))" 2>/dev/null; }

# a usable interpreter makes environments and has the headers that the C core is compiled against
complete() {
    "$1" -c 'import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

# the first python3 in PATH may be any build; another one in PATH, or Debian's, may be the one that is new and complete
find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if has "$python" && new_enough "$python" && complete "$python"; then
            "$python" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

header() { # header FILE [FLAG]: can the C compiler include it?
    printf '#include <%s>\n' "$1" | cc -E ${2:+"$2"} -x c - >/dev/null 2>&1
}

fuzzer() { # can clang link libFuzzer and the sanitizers?
    made=$(mktemp)
    printf '%s\n' '#include <stddef.h>' 'int LLVMFuzzerTestOneInput(const char *d, size_t n) { return d && n ? 0 : 0; }' |
        clang -fsanitize=fuzzer,address,undefined -x c -o "$made" - >/dev/null 2>&1 && status=0 || status=1
    rm -f "$made"
    return $status
}

check() {
    missing=''
    if ! python=$(find_python); then
        python=''
        if [ -x /usr/bin/python3 ] && ! new_enough /usr/bin/python3; then
            say "Python 3.11 or newer is needed, and this system has $(/usr/bin/python3 --version 2>&1)."
            say 'Use Debian 12 or newer, or put a newer python3 first in PATH.'
            exit 2
        fi
        need python3 python3-venv python3-dev
    fi
    if ! has cc; then need gcc libc6-dev libjson-c-dev; else
        header stdio.h || need libc6-dev
        header json.h -I/usr/include/json-c || header json.h -I/usr/local/include/json-c || need libjson-c-dev
    fi
    has mmdebstrap || need mmdebstrap
    has xz || need xz-utils
    has setpriv || need util-linux
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || need debian-archive-keyring
    [ -e /etc/ssl/certs/ca-certificates.crt ] || need ca-certificates
    [ "$purpose" != fuzz ] || fuzzer || need clang libclang-rt-dev
}

install() {
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    say "installing$missing"
    # a minimal image comes without package lists; an old list names packages that are gone: refresh, and try again
    # shellcheck disable=SC2086  # a list of words
    apt-get install -y --no-install-recommends $missing >"$log" 2>&1 ||
        { apt-get update >"$log" 2>&1 && apt-get install -y --no-install-recommends $missing >>"$log" 2>&1; } ||
        {
            tail -n 15 "$log" >&2
            rm -f "$log"
            return 1
        }
    rm -f "$log"
}

check
if [ -n "$missing" ]; then
    command="apt-get install --no-install-recommends$missing"
    if ! has apt-get; then
        say "these Debian packages, or what your system calls them, are missing:$missing"
        exit 2
    elif [ "$(id -u)" != 0 ]; then
        say "packages are missing. Run this, then try again:"
        say "  sudo $command"
        exit 2
    elif ! install; then
        say "packages are missing and could not be installed. Mend apt (see above), or run: $command"
        exit 2
    fi
    check
    if [ -n "$missing" ]; then
        say "still missing after their installation:$missing. Run: apt-get install --reinstall$missing"
        exit 2
    fi
fi
printf '%s\n' "$python"

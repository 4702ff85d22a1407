#!/bin/sh
# Make or refresh the environment in .venv: Python packages, the C core compiled, the `vioasid` command.
#
# A file newer than the stamp, another place of the tree, or a Python that is gone make it stale; otherwise this returns
# at once. Everything goes to stderr. Exit 2: it could not be made, and the last lines say why.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/vioasid-stamp
place=.venv/vioasid-place # programs in .venv name the folder they were made in

say() { printf 'vioasid: %s\n' "$*" >&2; }

# sources of the C core and what decides about packages; what the compilation itself writes is left out
sources() {
    find pyproject.toml setup.py tools/*.sh backend/core ! -name '_native*' \
        \( -name '*.[ch]' -o -name '*.toml' -o -name '*.sh' -o -name build.py -o -name setup.py \) "$@"
}

fresh() {
    [ -f "$stamp" ] && [ -f "$place" ] && [ -x .venv/bin/python ] && [ -x .venv/bin/vioasid ] || return 1
    [ "$(cat "$place")" = "$PWD" ] && [ -z "$(sources -newer "$stamp" | head -n 1)" ] || return 1
    for built in backend/core/_native*.so; do [ -f "$built" ] && return 0; done
    return 1
}

! fresh || exit 0

python=$(tools/host-setup.sh)

# one run at a time; the others find it fresh
exec 9<.
if ! flock -n 9; then
    say 'waiting for another run that sets up .venv'
    flock 9
fi
! fresh || exit 0

log=$(mktemp)
began=$(mktemp)
trap 'rm -f "$log" "$began"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { # step WHAT COMMAND...: quiet unless it fails
    what=$1
    shift
    [ ! -t 2 ] || printf 'vioasid: %s ...\n' "$what" >&2
    "$@" >"$log" 2>&1 9>&- </dev/null && return 0
    tail -n 30 "$log" >&2
    return 1
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if ! [ -x .venv/bin/python ] || [ "$(cat "$place" 2>/dev/null)" != "$PWD" ]; then
    rm -rf .venv
    step "making .venv with $("$python" --version)" "$python" -m venv .venv ||
        { say "$python cannot make an environment in $PWD/.venv (see above)"; exit 2; }
    printf '%s\n' "$PWD" >"$place"
fi
requires=$(.venv/bin/python -c 'import tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))')
rm -f "$stamp"
IFS='
'
# shellcheck disable=SC2086  # one requirement a line
step 'installing build tools' pip install $requires ||
    { say 'pip could not install the build tools (see above). Check the network and pip index, then try again.'; exit 2; }
# setuptools looks at the C files it was given, not at the headers and formats they include
rm -f backend/core/_native*.so
step 'installing packages and compiling the C core' pip install --no-build-isolation -e '.[dev]' ||
    { say 'pip could not install vioasid into .venv (see above).'; exit 2; }
touch -r "$began" "$stamp" # a source saved meanwhile is newer

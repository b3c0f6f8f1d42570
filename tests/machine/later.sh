#!/usr/bin/env bash
# Prints the path of a later QEMU than the system's, taken from Debian's backports and unpacked
# beside it, without installing anything. Fails where there is none.
set -euo pipefail
place=${XDG_CACHE_HOME:-$HOME/.cache}/xbmigrate/qemu-later
# Tests ask for it at the same time: the first one fetches it.
mkdir -p "$(dirname "$place")"
exec 9>"$place.lock"
flock 9
if [ ! -x "$place/run" ]; then
    . /etc/os-release
    [ "$ID" = debian ] || { echo "later.sh: only Debian has backports" >&2; exit 1; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/root"
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list \
        2>/dev/null >"$work/known" || true
    host=$(grep -v '^#' "$work/known" | grep -om1 'https\?://[^ ]*/debian/\?\( \|$\)') ||
        host=http://deb.debian.org/debian
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$key] ${host% } $VERSION_CODENAME-backports main" >"$work/sources.list"
    options=(-q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
    cd "$work"
    apt-get "${options[@]}" update >&2
    apt-get "${options[@]}" download qemu-system-x86 qemu-system-data seabios >&2
    for package in ./*.deb; do
        dpkg -x "$package" root
    done
    cat >root/run <<'SCRIPT'
#!/bin/sh
root=$(dirname "$0")/usr
exec "$root/bin/qemu-system-x86_64" -L "$root/share/seabios" -L "$root/share/qemu" \
    -L /usr/share/qemu "$@"
SCRIPT
    chmod +x root/run
    root/run --version >&2
    rm -rf "$place"
    mv root "$place"
fi
echo "$place/run"

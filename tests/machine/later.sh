#!/usr/bin/env bash
# Print the path of a QEMU that is newer than the system's. It comes from Debian's backports, from the
# mirror that this machine uses, and is unpacked in the cache: nothing is installed. Fail if there is none.
set -euo pipefail
place=${XDG_CACHE_HOME:-$HOME/.cache}/xbmigrate/qemu-later
# Tests run at the same time: the first one that needs it fetches it.
mkdir -p "$(dirname "$place")"
exec 9>"$place.lock"
flock 9
if [ ! -x "$place/run" ]; then
    . /etc/os-release
    [ "$ID" = debian ] || { echo "later.sh: only Debian has backports" >&2; exit 1; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/root"
    known=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list \
        2>/dev/null) || true
    # The address ends the line (URIs: of the deb822 format) or a blank follows it (one-line entries).
    mirror=$(sed -nE '/^#/d; s|.*(https?://[^ ]*/debian)/?( .*)?$|\1|p' <<<"$known")
    [ -n "$mirror" ] ||
        { echo "later.sh: no Debian mirror in /etc/apt/sources.list or sources.list.d" >&2; exit 1; }
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$key] ${mirror%%$'\n'*} $VERSION_CODENAME-backports main" >"$work/sources.list"
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

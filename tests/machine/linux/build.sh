#!/usr/bin/env bash
# Print the directory that has the kernel and the initramfs of the Linux guest. They are made in the
# cache, of Debian's packages, from the mirrors that this machine uses: nothing is installed. Fail if
# they cannot be made.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# What is made of other sources than these has another name: checkouts do not disturb each other.
made=$(cat "$here"/{build.sh,init,checker.c} | sha256sum | cut -c -12)
place=${XDG_CACHE_HOME:-$HOME/.cache}/xbmigrate/linux-guest
mkdir -p "$place"
# Tests run at the same time: the first one that needs it makes it.
exec 9>"$place/lock"
flock 9
if [ ! -e "$place/$made" ]; then
    [ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] ||
        { echo "build.sh: the guest is made of Debian's packages for amd64" >&2; exit 1; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{lists/partial,cache/archives/partial,packages,debian,guest}
    mkdir -p "$work"/root/{bin,dev,proc,sys,tmp,lib64}
    options=(-q -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
        -o APT::Sandbox::User=root -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
    apt-get "${options[@]}" update >&2

    depends() {  # PACKAGE, and OPTION... of apt-cache
        apt-cache "${options[@]}" depends --important "${@:2}" "$1"
    }
    kernel=$(depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
    libraries=$(depends redis-tools --recurse | grep -E '^(lib|lua)' | sort -u)
    cd "$work/packages"
    # shellcheck disable=SC2086
    apt-get "${options[@]}" download "$kernel" busybox-static redis-server redis-tools $libraries >&2
    for package in ./*.deb; do
        dpkg -x "$package" "$work/debian"
    done

    cd "$work"
    cp debian/boot/vmlinuz-* guest/kernel
    cp debian/bin/busybox root/bin/busybox
    gcc -O2 -static -o root/bin/checker "$here/checker.c"
    install "$here/init" root/init
    loader=debian/lib64/ld-linux-x86-64.so.2
    [ -e "$loader" ] || loader=debian/usr/lib64/ld-linux-x86-64.so.2
    paths=debian/lib/x86_64-linux-gnu:debian/usr/lib/x86_64-linux-gnu
    for program in redis-server redis-benchmark; do
        cp -L "debian/usr/bin/$program" root/bin
        # "libz.so.1 => debian/lib/x86_64-linux-gnu/libz.so.1 (0x...)"
        "$loader" --library-path "$paths" --list "debian/usr/bin/$program" |
            sed -n 's/.* => \(debian[^ ]*\) .*/\1/p' | xargs cp -L -t root/lib64
    done
    cp -L "$loader" root/lib64
    # Not compressed: an emulated processor would take long to unpack it.
    (cd root && find . | ../debian/bin/busybox cpio -o -H newc 2>/dev/null) >guest/initramfs
    find "$place" -mindepth 1 -maxdepth 1 -type d -mtime +7 -exec rm -rf {} +
    mv guest "$place/$made"
fi
echo "$place/$made"

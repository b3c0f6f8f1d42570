#!/usr/bin/env bash
# Prints the name of the image to build from: $1, the official one, where it is here or can be
# pulled; else a stand-in of the same Debian with the same Python, made from Debian's packages
# (which takes root, debootstrap and a minute), with this machine's certificates and pip settings.
set -euo pipefail
official=${1:-python:3.11-slim-bookworm}
stand_in=xbmigrate-base:bookworm

for image in "$official" "$stand_in"; do
    if docker image inspect "$image" >/dev/null 2>&1; then
        echo "$image"
        exit
    fi
done
if timeout 120 docker pull --quiet "$official" >/dev/null 2>&1; then
    echo "$official"
    exit
fi
command -v debootstrap >/dev/null || {
    echo "$official cannot be pulled, and debootstrap is not installed to make a stand-in" >&2
    exit 1
}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
# this machine's own mirror, if it names one; else debootstrap's
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null \
    | awk '/^(URIs:|deb) +http/ && !found {found = 1; print $2}') || true
debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv,python-is-python3 \
    bookworm "$root" ${mirror:+"$mirror"} >&2
rm -f "$root"/var/cache/apt/archives/*.deb "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
for own in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$own" ]; then
        install -D -m 0644 "$own" "$root$own"
    fi
done
tar -C "$root" -c . | docker import - "$stand_in" >/dev/null
echo "$stand_in"

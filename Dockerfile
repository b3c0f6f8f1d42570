# Two stages: the wheel needs a compiler, what runs does not.
#   docker build -t xbmigrate .                                     from the official Python image
#   docker build -t xbmigrate --build-arg BASE=python:3.13-slim .   from another one, Debian's like it
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update -q \
 && apt-get install -yq --no-install-recommends gcc libc6-dev \
 && { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
      || apt-get install -yq --no-install-recommends python3-dev; }
WORKDIR /src
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY proto proto
COPY migrate migrate
RUN python3 -m venv --without-pip /opt/xbmigrate \
 && python3 -m pip --python /opt/xbmigrate/bin/python install --no-cache-dir . \
 && find /opt/xbmigrate -name '*.so' -exec strip --strip-unneeded {} +

# A program of the second demo: a database whose file is memory (see docker-compose.yml).
FROM build AS build-ledger
RUN python3 -m pip --python /opt/xbmigrate/bin/python install --no-cache-dir lmdb

FROM ${BASE} AS bare
RUN useradd --uid 10001 --user-group --no-create-home xbmigrate \
 && install -d -o xbmigrate -g xbmigrate -m 0700 /run/xbmigrate /acks /guest
ENV PATH=/opt/xbmigrate/bin:$PATH PYTHONUNBUFFERED=1 \
    MIGRATE_JOURNAL=/run/xbmigrate/journal
USER xbmigrate

FROM bare AS ledger
COPY --from=build-ledger /opt/xbmigrate /opt/xbmigrate
COPY tests/compose/ledger.py /opt/ledger.py

FROM bare AS xbmigrate
COPY --from=build /opt/xbmigrate /opt/xbmigrate
CMD ["migrate-dst", "--listen", "4444"]

"""The state of QEMU's devices, field by field, as the description at the stream's end explains it.

    {"page_size": n, "devices": [{"name", "instance_id", "fields": [...], "subsections": [...]}]}
    field: {"name", "type", "size" [, "array_len"] [, "struct": {"fields", "subsections"}]}

A body is its fields one after the other, then its subsections. A subsection has a head: 05, the
length of its name, the name, a version. The size of a struct includes all that is in it. The
description comes from the sender of the stream: each size in it is compared with the bytes there
are before it is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from proto.qemu.parts import SUBSECTION
from proto.survey.facts import Field

MAX_TEXT = 16 << 20
MAX_FIELDS = 200_000
MAX_DEPTH = 32
MAX_ARRAY = 4096
SIGNED = {"int8": 1, "int16": 2, "int32": 4, "int64": 8}
UNSIGNED = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "timer": 8}


class DescriptionError(ValueError):
    """The description cannot be read, or does not fit the bytes."""


class Devices:
    """What a description says about each device. Raises DescriptionError."""

    def __init__(self, text: bytes) -> None:
        if len(text) > MAX_TEXT:
            raise DescriptionError(f"the description has {len(text)} bytes: too many to be read")
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DescriptionError(f"the description is no JSON: {_short(error)}") from None
        listed = told.get("devices") if isinstance(told, dict) else None
        if not isinstance(listed, list):
            raise DescriptionError("the description lists no devices")
        self._left = MAX_FIELDS
        self._devices: dict[tuple[str, int], dict[str, Any]] = {}
        for device in listed:
            if isinstance(device, dict):
                name, instance = device.get("name"), device.get("instance_id")
                if isinstance(name, str) and isinstance(instance, int):
                    self._devices.setdefault((name, instance), device)

    def decode(self, name: str, instance: int, body: bytes) -> tuple[list[Field], int]:
        """Decode the body of a device, as far as the description fits it.

        Returns (fields, bytes of the body that they take).
        """
        device = self._devices.get((name, instance))
        if device is None:
            return [], 0
        rest = _Body(body)
        fields: list[Field] = []
        with contextlib.suppress(DescriptionError):
            self._walk(device, rest, fields, 0)
        return fields, rest.at

    def _walk(self, device: dict[str, Any], body: _Body, out: list[Field], depth: int) -> None:
        """Read the fields of a device or a struct from its body into `out`."""
        if depth > MAX_DEPTH:
            raise DescriptionError("structs in structs without end")
        for told in _dicts(device.get("fields")):
            name, kind = str(told.get("name", "")), str(told.get("type", ""))
            size, length = _number(told.get("size")), told.get("array_len")
            times = 1 if length is None else _number(length)
            if not isinstance(told.get("struct"), dict):
                self._count()
                out.append(_plain(name, kind, size, body.take(size * times), length is not None))
                continue
            for i in range(times if size else min(times, 1)):
                self._count()
                inside, inner = _Body(body.take(size)), list[Field]()
                label = name if length is None else f"{name}[{i}]"
                out.append(Field(label, kind, size, fields=inner))
                self._walk(told["struct"], inside, inner, depth + 1)
        for told in _dicts(device.get("subsections")):
            name = str(told.get("vmsd_name", ""))
            self._count()
            start = body.at
            head = bytes([SUBSECTION, len(name) & 0xFF]) + name.encode("utf-8", "replace")
            if body.take(len(head)) != head:
                body.at = start
                raise DescriptionError(f"the subsection {name} is not there")
            body.take(4)
            inner = list[Field]()
            field = Field(name, "subsection", 0, fields=inner)
            out.append(field)
            self._walk(told, body, inner, depth + 1)
            field.size = body.at - start

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise DescriptionError("more fields than are listed")


class _Body:
    """Bytes that are read from their beginning."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise DescriptionError("a field goes beyond its body")
        self.at += count
        return self.data[self.at - count : self.at]


def _plain(name: str, kind: str, size: int, data: bytes, array: bool) -> Field:
    """Return a field that is not a struct."""
    word = kind.partition(" ")[0].removesuffix("_t")
    signed = word in SIGNED
    if (SIGNED | UNSIGNED).get(word) != size or size == 0:
        if kind == "bool" and size == 1 and not array and data in (b"\0", b"\1"):
            return Field(name, kind, size, data == b"\1")
        return Field(name, kind, len(data), data.hex())
    if not array:
        return Field(name, kind, size, int.from_bytes(data, "big", signed=signed))
    if len(data) // size > MAX_ARRAY or size == 1:
        return Field(name, kind, len(data), data.hex())
    values = [
        int.from_bytes(data[i : i + size], "big", signed=signed) for i in range(0, len(data), size)
    ]
    return Field(name, kind, len(data), values)


def _dicts(told: object) -> Iterator[dict[str, Any]]:
    for one in told if isinstance(told, list) else ():
        if isinstance(one, dict):
            yield one


def _number(told: object) -> int:
    if type(told) is not int or not 0 <= told < 1 << 40:
        raise DescriptionError("a size that is none")
    return told


def _short(error: Exception) -> str:
    return str(error)[:200]

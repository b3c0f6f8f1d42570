"""Plugs memory of a virtio-mem device into a machine, as the driver in a guest's kernel would.

The guest of the tests has no driver: `-qtest` gives us the ports and the memory of the machine.

    device found on the PCI bus -> its registers -> one queue -> a request PLUG -> its answer ACK

The queue stays: a device that is reset unplugs all of its memory (virtio 1.2, 4.1.4 and 5.15).
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

ID = 0x1058_1AF4  # virtio-mem
COMMON, NOTIFY, DEVICE = 1, 2, 4
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
MEMORY, MASTER = 2, 4
REGISTERS_AT, REGISTERS = 0xF000_0000, 1 << 20
QUEUE = 8
ACK = 0
TRIES = 1000


class Qtest:
    """A client of the socket of `-qtest unix:PATH,server=on,wait=off`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> Qtest:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 24))

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def say(self, *words: object) -> str:
        """Send a command; return the value of its answer, or ""."""
        self._writer.write(" ".join(map(str, words)).encode() + b"\n")
        answer = (await self._reader.readline()).decode().split()
        assert answer[:1] == ["OK"], (words, answer)
        return answer[1] if len(answer) > 1 else ""

    async def read(self, address: int, size: int) -> bytes:
        return bytes.fromhex((await self.say("read", address, size))[2:])

    async def write(self, address: int, data: bytes) -> None:
        await self.say("write", address, len(data), "0x" + data.hex())

    async def config(self, slot: int, at: int) -> int:
        """Return a word of the PCI configuration of a device on bus 0."""
        await self.say("outl", 0xCF8, 1 << 31 | slot << 11 | at)
        return int(await self.say("inl", 0xCFC), 16)

    async def set_config(self, slot: int, at: int, value: int) -> None:
        await self.say("outl", 0xCF8, 1 << 31 | slot << 11 | at)
        await self.say("outl", 0xCFC, value)


async def registers(qtest: Qtest, slot: int) -> tuple[dict[int, int], int]:
    """Return the address of each kind of register, and the multiplier of a queue's notification.

    The registers get an address here: the machine's firmware, guest.S, does not give them one.
    """
    found, multiplier = {}, 0
    at = await qtest.config(slot, 0x34) & 0xFF
    while at:
        head = await qtest.config(slot, at)
        if head & 0xFF == 9:
            kind, bar = head >> 24, await qtest.config(slot, at + 4) & 0xFF
            base = REGISTERS_AT + bar * REGISTERS
            await qtest.set_config(slot, 0x10 + 4 * bar, base)
            found[kind] = base + await qtest.config(slot, at + 8)
            if kind == NOTIFY:
                multiplier = await qtest.config(slot, at + 16)
        at = head >> 8 & 0xFF
    return found, multiplier


async def plug(qtest: Qtest, scratch: int, first: int, count: int) -> int:
    """Plug blocks first to first + count - 1; return the address of the device's memory.

    scratch -- address of 4096 bytes that the guest never touches, for the queue
    """
    slots = [slot for slot in range(32) if await qtest.config(slot, 0) == ID]
    assert slots, "there is no virtio-mem"
    slot = slots[0]
    command = await qtest.config(slot, 4)
    await qtest.set_config(slot, 4, command | MEMORY | MASTER)
    at, multiplier = await registers(qtest, slot)
    common = at[COMMON]
    size, address = struct.unpack("<Q8xQ", await qtest.read(at[DEVICE], 24))

    await qtest.write(common + 20, bytes(1))
    for feature in (0, 1):  # all that it offers
        await qtest.write(common, struct.pack("<I", feature))
        offered = await qtest.read(common + 4, 4)
        await qtest.write(common + 8, struct.pack("<I", feature) + offered)
    await qtest.write(common + 20, bytes([ACKNOWLEDGE | DRIVER | FEATURES_OK]))
    ring, used, request, answer = scratch, scratch + 1024, scratch + 2048, scratch + 3072
    available = scratch + 512
    await qtest.write(scratch, bytes(4096))
    await qtest.write(common + 22, struct.pack("<HH", 0, QUEUE))
    for offset, where in ((32, ring), (40, available), (48, used)):
        await qtest.write(common + offset, struct.pack("<I", where & 0xFFFFFFFF))
        await qtest.write(common + offset + 4, struct.pack("<I", where >> 32))
    await qtest.write(common + 28, struct.pack("<H", 1))
    await qtest.write(common + 20, bytes([ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK]))

    await qtest.write(request, struct.pack("<H6xQH6x", 0, address + first * size, count))
    await qtest.write(
        ring, struct.pack("<QIHHQIHH", request, 24, 1, 1, answer, 10, 2, 0)
    )  # one to read, and one to write  # fmt: skip
    await qtest.write(available, struct.pack("<HHH", 0, 1, 0))
    number = int.from_bytes(await qtest.read(common + 30, 2), "little")
    await qtest.write(at[NOTIFY] + number * multiplier, bytes(2))
    for _ in range(TRIES):
        if await qtest.read(used + 2, 2) == b"\1\0":
            break
        await asyncio.sleep(0.01)
    assert int.from_bytes(await qtest.read(answer, 2), "little") == ACK
    return int(address)

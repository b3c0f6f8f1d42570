"""python -m tests.machine capture FILE: the stream of a real QEMU whose guest counts."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from migrate.errors import UsageError
from migrate.units import parse_size
from tests.machine import Machine, Sweep
from tests.machine.capture import capture
from tests.machine.qemu import PROGRAM


def size(text: str) -> int:
    try:
        return parse_size(text, "size")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.machine")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "capture", help="take the migration stream of a real QEMU into a file"
    )
    add = command.add_argument
    add("file", type=Path, metavar="FILE")
    add("--memory", type=Path, metavar="FILE", help="the guest's memory when it had moved")
    add("--size", type=size, default="64m", help="of the guest's memory (64m)")
    add("--hot", type=size, default="16m", help="of what it writes, from 1 MiB on (16m)")
    add("--fill", type=size, help="of what is not zero, from 1 MiB on (half of --size)")
    add("--stride", type=size, default="4096", help="from one byte it writes to the next (4096)")
    add("--rate", type=int, default=400_000, help="increments a second, 0: all it can (400000)")
    add("--bandwidth", type=size, default="64m", help="of the stream, a second (64m)")
    add("--passes", type=int, default=4, help="over the memory, at least (4)")
    add("--xbzrle", action="store_true")
    add("--return-path", action="store_true")
    add("--blocks", default="", metavar="NAME,...", help="of its memory, equal parts (pc.ram)")
    add("--dimm", type=size, default="0", help="of one more block, random")
    add("--device", action="append", default=[], help="one more, as -device has it; repeatable")
    add("--machine", default="pc", help="its type (pc)")
    add("--binary", default=PROGRAM, help=f"the QEMU ({PROGRAM})")
    return parser.parse_args()


async def main() -> None:
    chosen = arguments()
    fill = chosen.size // 2 if chosen.fill is None else chosen.fill
    try:
        sweep = Sweep(chosen.hot, stride=chosen.stride, fill=fill, rate=chosen.rate)
        machine = Machine(
            sweep, size=chosen.size, blocks=[name for name in chosen.blocks.split(",") if name],
            dimm=chosen.dimm, devices=chosen.device, machine=chosen.machine, binary=chosen.binary,
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(str(error)) from None
    switched = {"xbzrle": chosen.xbzrle, "return-path": chosen.return_path}
    async with machine:
        await machine.wait_for_count(sweep.every)
        info = await capture(
            machine, chosen.file, *(name for name, on in switched.items() if on),
            passes=chosen.passes, bandwidth=chosen.bandwidth,
        )  # fmt: skip
        if chosen.memory:
            chosen.memory.write_bytes(await machine.read(0, chosen.size))
    print(json.dumps(info, indent=2))


if __name__ == "__main__":
    asyncio.run(main())

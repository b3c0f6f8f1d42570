"""Migrations in a row, while connections and programs are broken at random; each one verified.

    python -m tests.soak [--rounds N] [--seed N] [--minutes N] [--guests demo,file,buffer,qemu]

A round moves one guest: the demo guest, a file that a program writes, a buffer of this program, or
a virtual machine (see soak_qemu.py). Its size, page size, cache, channels, rate and speed are
random, and so are the faults: connections that are cut, a network that is down for a while, either
program stopped for a while, or killed and started again, at any moment, the hand-over included;
programs whose output fails; a second migrate-src that wants the same guest; a second writer of the
file that nobody named. It ends when the guest has arrived, however many attempts that takes; in
between exactly one side may run it. Then every byte is compared.

A round that goes wrong ends the soak with all that was said; the same seed makes the same faults,
but not at the same moments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import migrate
from migrate.errors import ConnectError, PeerLost, UsageError
from migrate.guests.demo.handle import DemoProcess
from migrate.guests.demo.layout import Owner
from migrate.transport.address import Address
from tests.programs import Program, end_guest, look_at
from tests.soak_qemu import missing, qemu_round
from tests.tally import Tally, Wrong, require
from tests.tap import Tap

KIB = 1 << 10
MIB = 1 << 20
PATIENCE = 60.0
ATTEMPTS = 12
GUESTS = ("demo", "file", "file", "buffer", "qemu")

WRITER = """
import mmap, os, random, sys, time
file = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(file, 0)
noise, size = random.Random(int(sys.argv[2])), len(memory)
hot = max(size // 4, 64)
print("writing", flush=True)
fork_at = time.monotonic() + float(sys.argv[3])
while True:
    if time.monotonic() > fork_at:
        os.fork()
        fork_at = float("inf")
    for _ in range(200):
        at = noise.randrange(hot - 32)
        memory[at:at + 32] = noise.randbytes(32)
    at = noise.randrange(size)
    memory[at:at + 1] = b"x"
"""

# Opens the file later than the other one, and is not named by --pid.
SECOND_WRITER = """
import mmap, os, random, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
print("writing", flush=True)
while True:
    at = random.randrange(len(memory))
    memory[at:at + 1] = bytes([memory[at] ^ 255])
"""


def size_of(chance: random.Random) -> int:
    """Mostly no whole number of pages."""
    return int(2 ** chance.uniform(16, 25)) + chance.choice([0, 1, 4095, chance.randrange(16384)])


def counts(pid: int) -> bool:
    """Whether a demo guest runs, or would: it is ours."""
    try:
        process = DemoProcess.attach(pid)
    except UsageError:
        return False
    try:
        return process.owner == Owner.OURS and process.alive()
    finally:
        process.close()


# ---------------------------------------------------------------- two programs


class Move:
    """One guest on its way between the two programs, through a tap that can be cut."""

    def __init__(self, chance: random.Random, tally: Tally, directory: Path, kind: str) -> None:
        self.chance, self.tally, self.directory = chance, tally, directory
        self.page_size = chance.choice([1024, 4096, 4096, 4096, 16384])
        size = size_of(chance)
        self.size = size if kind == "file" else -(-size // self.page_size) * self.page_size
        seconds = chance.uniform(0.4, 2.0)  # for the first round
        self.journal = ["--journal", str(directory)]
        both = [*self.journal, "--retry", "20s", "--resolve-timeout", "20s"]
        self.destination_words = [*both]
        cache = max(self.page_size, 1 << chance.randrange(12, 27))
        self.source_words = [
            *both, "--page-size", str(self.page_size), "--cache-size", str(cache),
            "--channels", str(chance.choice([1, 1, 2, 5])), "--progress", "plain",
            "--max-bandwidth", str(int(self.size / seconds)), "--connect-timeout", "5s",
            "--downtime-limit", "5000", "--stall-timeout", "0", "--peer-timeout", "3s",
        ]  # fmt: skip
        if chance.random() < 0.2:
            self.source_words += ["--capability", "xbzrle=off"]
        self.said = ""
        self.port = 0
        self.receiver = self.listen()
        self.tap = Tap(self.address, lambda *_: False)

    # -- each kind of guest

    def guest(self) -> list[str]:
        raise NotImplementedError

    def runs_here(self) -> bool:
        raise NotImplementedError

    def runs_there(self) -> bool:
        raise NotImplementedError

    def verify(self) -> int:
        """Bytes that were compared."""
        raise NotImplementedError

    def moved(self) -> bool:
        """Nobody would start migrate-src again."""
        return False

    def end(self) -> None:
        for program in (self.receiver, getattr(self, "source", None)):
            if program is not None:
                program.kill()
                program.wait()
        self.tap.close()

    # -- the programs

    def listen(self) -> Program:
        program = Program(
            "migrate-dst", "--listen", f"127.0.0.1:{self.port}", *self.destination_words,
            stdout=self.print_to(),
        )  # fmt: skip
        self.address = program.read_line(r"listening on (\S+)")[1]
        self.port = int(self.address.rpartition(":")[2])
        return program

    def send(self) -> Program:
        return Program(
            "migrate-src", *self.source_words, "--guest", *self.guest(), self.tap.address,
            stdout=self.print_to(),
        )  # fmt: skip

    def print_to(self) -> int:
        """Where a program prints its result."""
        return subprocess.PIPE

    def ended(self, program: Program) -> int:
        code = program.wait(PATIENCE)
        name = Path(program.process.args[0]).name  # type: ignore[index]
        self.tally.endings[f"{name} {code}"] += 1
        self.tally.resumed += program.err.count("resuming at")
        self.said += f"--- {name} ended with {code}\n{program.err}{program.out}\n"
        return code

    def again(self, side: str) -> None:
        """Killed, and started again."""
        if side == "source":
            self.source.kill()
            self.ended(self.source)
            if not self.moved():
                self.source = self.send()
        else:
            self.receiver.kill()
            self.ended(self.receiver)
            self.receiver = self.listen()

    def faults(self) -> dict[str, Callable[[], None]]:
        """All that can go wrong, by name."""
        return {
            "cut": self.tap.cut,
            "outage": self.outage,
            "source stopped": lambda: self.pause(self.source),
            "destination stopped": lambda: self.pause(self.receiver),
            "source killed": lambda: self.again("source"),
            "destination killed": lambda: self.again("destination"),
            "both killed": self.both_again,
        }

    def fault(self) -> None:
        faults = self.faults()
        kind = self.chance.choice([*faults, "cut"])
        self.tally.faults[kind] += 1
        self.said += f"--- {kind}\n"
        faults[kind]()

    def outage(self) -> None:
        self.tap.close()
        time.sleep(self.chance.uniform(0.1, 1.5))
        self.tap.open()

    def pause(self, program: Program) -> None:
        program.kill(signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.1, 1.0))
        program.kill(signal.SIGCONT)

    def both_again(self) -> None:
        self.source.kill()
        self.receiver.kill()
        self.again("destination")
        self.again("source")

    def run(self) -> None:
        """Moves the guest, come what may."""
        self.source = self.send()
        for _ in range(self.chance.choice([0, 1, 1, 2, 3, 6])):
            time.sleep(self.chance.uniform(0.0, 1.2))
            if self.source.process.poll() is not None:
                break
            self.fault()
        for _ in range(ATTEMPTS):
            code = self.ended(self.source)
            if code == 0:
                break
            self.settle(code)
            if self.runs_there():
                break
            if self.receiver.process.poll() is not None:
                self.ended(self.receiver)
                self.receiver = self.listen()
            self.source = self.send()
        else:
            raise Wrong(f"it did not arrive in {ATTEMPTS} attempts")
        require(self.runs_there(), "it runs nowhere: the source says it has arrived")
        require(not self.runs_here(), "there are two of it")
        self.tally.compared += self.verify()

    def settle(self, code: int) -> None:
        """After a source that failed: whose is the guest? Exactly one side's."""
        resolved = ""
        for _ in range(20):
            if self.receiver.process.poll() is not None:
                self.ended(self.receiver)
                self.receiver = self.listen()
            program = Program("migrate-src", "resolve", *self.journal)
            status = program.wait()
            resolved = program.out + program.err
            if status == 0:
                break
            time.sleep(0.3)
        else:
            raise Wrong(f"it cannot be resolved after {code}: {resolved}")
        self.said += f"--- resolve: {resolved}\n"
        require(not (self.runs_here() and self.runs_there()), "there are two of it")
        end = time.monotonic() + 5
        while not (self.runs_here() or self.runs_there()):
            require(time.monotonic() < end, f"it runs nowhere after {code} and {resolved}")
            time.sleep(0.05)


class DemoMove(Move):
    def __init__(self, chance: random.Random, tally: Tally, directory: Path) -> None:
        super().__init__(chance, tally, directory, "demo")
        self.here = 0
        hot = max(self.size // chance.choice([2, 4, 16]), 64)
        stride = chance.choice([64, 512, 1024, 4096])
        fill = chance.choice(["zero", "random"])
        self.spec = f"demo:{self.size},hot={hot},stride={stride},fill={fill}"

    def guest(self) -> list[str]:
        return [f"demo:pid={self.here}" if self.here else self.spec]

    def send(self) -> Program:
        program = super().send()
        if not self.here:
            self.here = int(program.read_line(r"moving demo guest, process (\d+)")[1])
        return program

    def landed(self) -> int:
        """The process at the destination, from what its programs have said; 0 for none."""
        found = re.findall(r"demo guest runs in process (\d+)", self.said + self.receiver.err)
        return int(found[-1]) if found else 0

    def runs_here(self) -> bool:
        return counts(self.here)

    def runs_there(self) -> bool:
        if self.receiver.process.poll() is None and not self.landed():
            # It ends once its guest runs and the source knows.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.receiver.process.wait(2)
        if self.receiver.process.poll() is not None:
            self.ended(self.receiver)
        return bool(self.landed()) and counts(self.landed())

    def verify(self) -> int:
        before, after, wrong = look_at(self.landed(), 0.2)
        require(wrong < 0, f"byte {wrong} is wrong")
        require(after >= before, "it went back in time")
        return self.size

    def end(self) -> None:
        super().end()
        for pid in (self.here, self.landed()):
            if pid:
                end_guest(pid)


class FileMove(Move):
    """A program writes the file all the time; it is stopped, and its file is what was moved."""

    def __init__(self, chance: random.Random, tally: Tally, directory: Path) -> None:
        self.memory, self.output = directory / "memory", directory / "output"
        self.other_output = directory / "other"
        self.full_disk = os.open("/dev/full", os.O_WRONLY)
        reader, self.broken_pipe = os.pipe()
        os.close(reader)
        super().__init__(chance, tally, directory, "file")
        content = bytearray(self.size)
        if chance.random() < 0.7:
            content[: self.size // 2] = random.Random(1).randbytes(self.size // 2)
        self.memory.write_bytes(content)
        # One more writer, that nobody has named, appears at some time.
        self.auto = chance.random() < 0.5
        late = str(chance.uniform(0, 4) if self.auto else 1e9)
        self.writer = started(WRITER, str(self.memory), "5", late)

    def listen(self) -> Program:
        # One that is only to answer needs another output.
        output = f"{self.output}-2" if self.moved() else str(self.output)
        words = self.destination_words
        self.destination_words = [*words, "--output", output]
        program = super().listen()
        self.destination_words = words
        return program

    def moved(self) -> bool:
        return self.runs_there()

    def guest(self) -> list[str]:
        return [f"file:{self.memory}", "--pid", "auto" if self.auto else str(self.writer.pid)]

    def runs_here(self) -> bool:
        line = Path(f"/proc/{self.writer.pid}/stat").read_text()
        return line.rpartition(")")[2].split()[0] not in "TtZX"

    def runs_there(self) -> bool:
        return self.output.exists() or self.other_output.exists()

    def verify(self) -> int:
        arrived = [path for path in (self.output, self.other_output) if path.exists()]
        require(len(arrived) == 1, "there are two of it")
        require(arrived[0].read_bytes() == self.memory.read_bytes(), "the files differ")
        # Where the second source won, what came half-way to the first destination is kept.
        left = [name for name in os.listdir(self.directory) if name.endswith(".xbmigrate")]
        require(not left or arrived[0] == self.other_output, f"left behind: {left}")
        return self.size

    def end(self) -> None:
        super().end()
        os.killpg(self.writer.pid, signal.SIGKILL)
        ended(self.writer)
        os.close(self.full_disk)
        os.close(self.broken_pipe)

    def print_to(self) -> int:
        """A file on a full disk, or a pipe that nobody reads, now and then."""
        if self.chance.random() < 0.7:
            return subprocess.PIPE
        self.tally.faults["output fails"] += 1
        return self.chance.choice([self.full_disk, self.broken_pipe])

    # -- what else can go wrong

    def faults(self) -> dict[str, Callable[[], None]]:
        return super().faults() | {
            "second source": self.second_source,
            "second writer": self.second_writer,
        }

    def second_source(self) -> None:
        """Wants the same guest, for another destination; with the same journal, or its own."""
        if self.moved():
            return
        with tempfile.TemporaryDirectory(dir=self.directory) as own:
            journal = ["--journal", self.chance.choice([own, str(self.directory)])]
            receiver = Program(
                "migrate-dst", "--listen", "127.0.0.1:0", "--journal", own,
                "--output", str(self.other_output),
            )  # fmt: skip
            address = receiver.read_line(r"listening on (\S+)")[1]
            source = Program(
                "migrate-src", *self.source_words, *journal, "--guest", *self.guest(), address
            )
            code = self.ended(source)
            require(
                (code == 0) == self.other_output.exists(),
                f"the second source says {code}, its guest has come: {self.other_output.exists()}",
            )
            if code != 0:
                receiver.kill()
            self.ended(receiver)

    def second_writer(self) -> None:
        """Opens the file for a while; what it writes must not be lost."""
        writer = started(SECOND_WRITER, str(self.memory))
        time.sleep(self.chance.uniform(0.1, 1.0))
        ended(writer)


def started(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A program that writes, once it has said so."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


# ---------------------------------------------------------------- two Python programs


async def buffer_round(chance: random.Random, tally: Tally) -> str:
    """Two halves of this program; what it can do is cut and wait. What was said."""
    page_size = chance.choice([1024, 4096, 16384])
    memory = bytearray(chance.randbytes(size_of(chance)))
    marks = chance.random() < 0.5
    guest = migrate.BufferGuest(memory, marks=marks, page_size=page_size)
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    receiving = asyncio.create_task(
        migrate.receive("127.0.0.1:0", listening=ready.set_result, retry=20)
    )
    tap = Tap(str(await ready), lambda *_: False)
    said: list[str] = []
    stop = threading.Event()

    def write() -> None:
        noise = random.Random(1)
        with contextlib.suppress(migrate.GuestMoved):
            while not stop.is_set():
                with guest.writing():
                    at = noise.randrange(max(len(memory) - 64, 1))
                    new = noise.randbytes(min(64, len(memory) - at))
                    memory[at : at + len(new)] = new
                    if marks:
                        guest.mark(at, len(new))
                time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    parameters = migrate.Parameters(
        cache_size=max(page_size, 1 << chance.randrange(12, 27)),
        page_size=page_size,
        channels=chance.choice([1, 1, 2, 5]),
        limits=migrate.Limits(
            max_bandwidth=int(len(memory) / chance.uniform(0.4, 2.0)), downtime_limit=5.0
        ),
    )

    async def send() -> migrate.Statistics:
        """Until it is heard of at the other end, a break is a failure: then once more."""
        while True:
            with contextlib.suppress(PeerLost, ConnectError):
                return await migrate.send(
                    guest, tap.address, parameters, retry=20,
                    observer=lambda event, _: said.append(event) if event.startswith("n") else None,
                )  # fmt: skip

    sending = asyncio.create_task(send())
    try:
        for _ in range(chance.choice([0, 1, 1, 2, 3, 6])):
            await asyncio.sleep(chance.uniform(0, 1.0))
            if sending.done():
                break
            kind = chance.choice(["cut", "outage"])
            tally.faults[kind] += 1
            if kind == "cut":
                tap.cut()
            else:
                tap.close()
                await asyncio.sleep(chance.uniform(0.1, 1.5))
                tap.open()
        async with asyncio.timeout(PATIENCE):
            try:
                statistics = await sending
                tally.resumed += statistics.reconnects
            except migrate.MigrationError as error:
                # In the pause of a hand-over it may be given up before there was an ACCEPT.
                said.append(str(error))
                raise Wrong(f"it did not arrive: {error}") from None
            arrived = await receiving
    finally:
        stop.set()
        await asyncio.to_thread(writer.join)
        for task in (sending, receiving):
            task.cancel()
        tap.close()
    require(arrived.memory == memory, "the memories differ")
    tally.compared += len(memory)
    return "\n".join(said)


# ---------------------------------------------------------------- all of it


def one_round(number: int, seed: int, tally: Tally, guests: Sequence[str]) -> None:
    """Raises Wrong, with all that was said."""
    chance = random.Random(f"{seed} {number}")
    kind = chance.choice(guests)
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xbmigrate-soak-"))
    move: Move | None = None
    try:
        if kind == "buffer":
            asyncio.run(buffer_round(chance, tally))
        elif kind == "qemu":
            qemu_round(chance, tally, directory)
        else:
            move = (DemoMove if kind == "demo" else FileMove)(chance, tally, directory)
            move.run()
        tally.rounds[kind] += 1
    except (AssertionError, subprocess.TimeoutExpired) as error:
        said = ""
        if move is not None:
            for program in (move.receiver, getattr(move, "source", None)):
                if program is not None and program.process.poll() is None:
                    program.kill()
                    move.ended(program)
            said = move.said
        raise Wrong(f"round {number} of seed {seed}, {kind}: {error}\n{said}") from None
    finally:
        if move is not None:
            move.end()
        shutil.rmtree(directory, ignore_errors=True)


def soak(
    rounds: int, seed: int, minutes: float = 0.0, guests: Sequence[str] = GUESTS[:-1]
) -> Tally:
    tally, began = Tally(), time.monotonic()
    for number in range(rounds):
        one_round(number, seed, tally, guests)
        passed = time.monotonic() - began
        if sys.stdout.isatty() or (number + 1) % 10 == 0:
            print(f"{tally.report(passed)}\n", flush=True)
        if minutes and passed > minutes * 60:
            break
    return tally


def _guests(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := set(kinds) - set(GUESTS):
        raise argparse.ArgumentTypeError(f"no such guests: {', '.join(sorted(unknown))}")
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--guests", type=_guests, default=GUESTS, metavar="KIND,...")
    args = parser.parse_args()
    if "qemu" in args.guests and (absent := missing()):
        parser.error(f"not installed: {absent}; --guests demo,file,buffer does without QEMU")
    os.environ.setdefault("MIGRATE_JOURNAL", tempfile.mkdtemp(prefix="xbmigrate-journal-"))
    print(f"seed {args.seed}", flush=True)
    began = time.monotonic()
    try:
        tally = soak(args.rounds, args.seed, args.minutes, args.guests)
    except Wrong as wrong:
        print(f"WRONG: {wrong}", flush=True)
        return 1
    print(tally.report(time.monotonic() - began))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Soak rounds with a virtual machine, carried from one QEMU to another.

    QEMU --> migrate-src ==> tap ==> migrate-dst --> QEMU -incoming

An attempt is broken several times, at random moments or when a message of the hand-over passes.
Then the owner is resolved: whatever broke, exactly one of the two QEMUs has the guest. If that is
the first one, a new attempt begins with another incoming QEMU. If it is the second one, all memory
is compared, and the guest goes on counting. A guest whose QEMU was killed is gone; then the
programs must not say that the other QEMU has it, nor bring that about.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from migrate.ownership.stored_journals import journals
from proto.wire.messages import MessageType
from proto.wire.ownership import Claim, Role
from tests.machine import Machine, Sweep, compare
from tests.machine.qemu import PROGRAM, MachineError
from tests.programs import Program
from tests.tally import Tally, Wrong, require
from tests.tap import Tap

MIB = 1 << 20
PATIENCE = 60.0
ATTEMPTS = 6
BROKEN_ATTEMPTS = 3
SETTLE_SECONDS = 20.0
LET_GO = 2_000_000  # ms: QEMU stops its guest whatever is dirty

HAND_OVER = [MessageType.COMPLETE, MessageType.READY, MessageType.GO, MessageType.RUNNING]
FAULTS = [
    "cut", "outage", "source stopped", "destination stopped", "source killed",
    "destination killed", "both killed", "source interrupted", "destination interrupted",
    "cancelled by QEMU", "incoming QEMU killed",
]  # fmt: skip
THERE = "the guest runs at the destination"
LOOK = "look whether it runs there"
IN_TWO = "it may run here too"


def missing() -> str:
    """Return what these rounds need that is not installed, or ""."""
    programs = {PROGRAM: "qemu-system-x86", "gcc": "gcc", "setpriv": "util-linux"}
    absent = [f"{name} ({package})" for name, package in programs.items() if not shutil.which(name)]
    return ", ".join(absent)


class Attempt:
    """One attempt: the incoming QEMU, the two programs, and what was done to them."""

    def __init__(self, move: QemuMove, target: Machine) -> None:
        self.move, self.target = move, target
        self.killed = self.cancelled = False
        self.loop = asyncio.get_running_loop()

    async def begin(self, incoming: str, faults: int) -> None:
        move, chance = self.move, self.move.chance
        move.there = f"qmp={move.directory}/in.qmp" if incoming == "defer" else ""
        move.there = f"qemu:{move.there or await self.target.uri()}"
        self.receiver = await asyncio.to_thread(move.listen)
        in_hand_over = bool(faults) and chance.random() < 0.6
        self.at = chance.choice(HAND_OVER) if in_hand_over else None
        self.faults = faults - in_hand_over
        self.tap = Tap(move.address, lambda seen, _head, _channel: seen is self.at)
        kind = chance.choice(FAULTS)
        self.late: threading.Timer | None = None
        if chance.random() < 0.5:
            self.tap.act = lambda: self.break_(kind, self.at)
        else:
            self.late = threading.Timer(chance.uniform(0, 0.05), self.break_, (kind, self.at))
            self.tap.act = self.late.start
        self.sender = move.program("migrate-src", "--guest", move.guest, *move.here,
                                   self.tap.address)  # fmt: skip

    async def carry(self) -> int:
        """Migrate, and break it; return the exit code of migrate-src."""
        move, chance, source = self.move, self.move.chance, self.move.source
        letting_go = None
        if not move.driven:
            found = await asyncio.to_thread(self.sender.read_line, r"waiting for QEMU at (\S+)")
            await source.migrate(
                found[1], "return-path", max_bandwidth=move.speed, downtime_limit=1
            )
            letting_go = asyncio.create_task(self._let_go(chance.uniform(0.0, 2.5)))
        for _ in range(self.faults):
            await asyncio.sleep(chance.uniform(0.0, 1.5))
            if self.sender.process.poll() is not None:
                break
            await asyncio.to_thread(self.break_, chance.choice(FAULTS), None)
        code = await asyncio.to_thread(move.ended, self.sender)
        if self.late is not None and self.late.ident is not None:
            await asyncio.to_thread(self.late.join)
        if letting_go is not None:
            letting_go.cancel()
            await asyncio.gather(letting_go, return_exceptions=True)
        return code

    async def _let_go(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.move.source.prepare(max_bandwidth=0, downtime_limit=LET_GO)

    def break_(self, kind: str, at: MessageType | None) -> None:
        """Do one fault. Runs in a thread beside the loop's.

        at -- the message that passes, if that is when it happens
        """
        move, chance = self.move, self.move.chance
        name = f"{kind} at {at.name}" if at else kind
        move.tally.faults[name] += 1
        move.say(f"--- {name}")
        if kind == "cut":
            self.tap.cut()
        elif kind == "outage":
            self.tap.close()
            time.sleep(chance.uniform(0.1, 1.5))
            self.tap.open()
        elif kind.endswith("stopped"):
            program = self.sender if kind.startswith("source") else self.receiver
            program.kill(signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 1.0))
            program.kill(signal.SIGCONT)
        elif kind == "cancelled by QEMU":
            self.cancelled = True
            coming = asyncio.run_coroutine_threadsafe(
                move.source.execute("migrate_cancel"), self.loop
            )
            coming.result(PATIENCE)
        elif kind == "incoming QEMU killed":
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.target.pid, signal.SIGKILL)
        else:
            self._end(kind, signal.SIGINT if kind.endswith("interrupted") else signal.SIGKILL)

    def _end(self, kind: str, number: signal.Signals) -> None:
        if not kind.startswith("destination"):
            self.sender.kill(number)
        if not kind.startswith("source"):
            self.receiver.kill(number)
        if number is signal.SIGKILL and self.move.chance.random() < 0.3:
            self.tap.cut()  # what they had sent is lost
        if kind == "destination killed" and self.move.chance.random() < 0.7:
            self.again()

    def again(self) -> None:
        """Start a migrate-dst again, so that one can be asked."""
        if self.receiver.process.poll() is None:
            self.receiver.kill()
        self.move.ended(self.receiver)
        self.receiver = self.move.listen()

    async def resolved(self) -> str:
        """Run `migrate-src resolve` until it succeeds; return its output."""
        said, end = "", time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            if self.receiver.process.poll() is not None:
                await asyncio.to_thread(self.again)
            program = self.move.program("migrate-src", "resolve", *self.move.journal)
            status = await asyncio.to_thread(program.wait)
            said = program.out + program.err
            self.move.say(f"--- resolve: {status} {said}")
            if status == 0:
                return said
            if LOOK in said:
                await self._look(said)
            await asyncio.sleep(0.3)
        raise Wrong(f"it cannot be resolved: {said}")

    async def _look(self, said: str) -> None:
        """Do what the message asks a person to do."""
        self.move.tally.endings["settled by hand"] += 1
        keep = "destination" if await self.arrived() else "source"
        name = said.partition("migrate-dst resolve ")[2].partition(" ")[0]
        self.receiver.kill()
        await asyncio.to_thread(self.move.ended, self.receiver)
        words = ["resolve", name, "--keep", keep, "--force", *self.move.journal]
        program = self.move.program("migrate-dst", *words)
        status = await asyncio.to_thread(program.wait)
        self.move.say(f"--- migrate-dst resolve: {status} {program.out}{program.err}")

    async def arrived(self) -> bool:
        with contextlib.suppress(MachineError):
            state = await self.target.execute("query-status")
            return state["status"] in ("paused", "running")
        return False

    async def close(self) -> None:
        for program in (getattr(self, "sender", None), getattr(self, "receiver", None)):
            if program is not None:
                program.kill()
                await asyncio.to_thread(self.move.ended, program)
        if hasattr(self, "tap"):
            with contextlib.suppress(AssertionError):
                self.tap.close()


class QemuMove:
    """The guest of one round, and the options that were chosen for it."""

    def __init__(self, chance: random.Random, tally: Tally, directory: Path) -> None:
        self.chance, self.tally, self.directory = chance, tally, directory
        self.out = chance.choice(["tcp", "unix", "qmp", "qmp", "tcp and qmp"])
        self.incoming = chance.choice(["tcp", "unix", "defer"])
        self.driven = "qmp" in self.out
        qmp, uri = f"{directory}/out.qmp", "tcp:127.0.0.1:0"
        self.guest = "qemu:" + {
            "tcp": uri, "unix": f"unix:{directory}/out", "qmp": f"qmp={qmp}",
            "tcp and qmp": f"{uri},qmp={qmp}",
        }[self.out]  # fmt: skip
        self.speed = chance.choice([4, 8, 16, 64]) * MIB
        self.journal = ["--journal", f"{directory}/journals"]
        both = [*self.journal, "--retry", "4s", "--resolve-timeout", "8s", "--peer-timeout", "3s"]
        self.there_words = both
        self.here = [
            *both, "--channels", str(chance.choice([1, 3])), "--connect-timeout", "5s",
            "--downtime-limit", str(chance.choice([500, 2000])), "--timeout", "20s",
            "--max-bandwidth", str(self.speed), "--progress", "plain",
        ]  # fmt: skip
        self.here += chance.choice([[], [], ["--capability", "xbzrle=off"]])
        self.here += chance.choice([[], [], ["--cache-size", "1m"]])
        self.sweep = Sweep(
            chance.choice([1, 4]) * MIB, fill=chance.choice([4, 6, 12]) * MIB,
            rate=chance.choice([200_000, 1_000_000]),
        )  # fmt: skip
        self.port = 0
        self.said = ""
        self.say(f"--- {self.guest}, incoming {self.incoming}: {self.here} {self.sweep}")

    def say(self, text: str) -> None:
        self.said += f"{time.monotonic():.2f} {text}\n"

    # -- the programs

    def program(self, name: str, *words: str) -> Program:
        return Program(name, *words)

    def listen(self) -> Program:
        program = self.program(
            "migrate-dst", "--listen", f"127.0.0.1:{self.port}", "--guest", self.there,
            *self.there_words,
        )  # fmt: skip
        self.address = program.read_line(r"listening on (\S+)")[1]
        self.port = int(self.address.rpartition(":")[2])
        return program

    def ended(self, program: Program) -> int:
        if program.process.stderr is None or program.process.stderr.closed:
            return program.process.returncode  # type: ignore[return-value]
        code = program.wait(PATIENCE)
        name = Path(program.process.args[0]).name  # type: ignore[index]
        self.tally.endings[f"{name} {code}"] += 1
        self.tally.resumed += program.err.count("resuming: ")
        self.say(f"--- {name} ended with {code}\n{program.err}{program.out}")
        return code

    # -- the round

    def machine(self, name: str, **options: Any) -> Machine:
        qmp = ["-qmp", f"unix:{self.directory}/{name}.qmp,server=on,wait=off"]
        return Machine(self.sweep, extra=qmp, **options)

    async def run(self) -> None:
        """Migrate the guest, in as many attempts as that takes. Raises Wrong."""
        async with self.machine("out") as self.source:
            await self.source.wait_for_count(self.sweep.every)
            for number in range(ATTEMPTS):
                faults = self.chance.choice([1, 1, 2, 3]) if number < BROKEN_ATTEMPTS else 0
                if await self._attempt(faults):
                    return
        raise Wrong(f"it did not arrive in {ATTEMPTS} attempts")

    async def _attempt(self, faults: int) -> bool:
        """Return whether the round is over: the guest has arrived, or its QEMU was killed."""
        where = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{self.directory}/in"}
        incoming = where.get(self.incoming, self.incoming)
        target = self.machine("in", incoming=incoming, before=self.source, paused=True)
        async with target:
            attempt = Attempt(self, target)
            try:
                await attempt.begin(self.incoming, faults)
                code = await attempt.carry()
                return await self._settle(attempt, code)
            finally:
                await attempt.close()

    async def _settle(self, attempt: Attempt, code: int) -> bool:
        """Check that one QEMU has the guest; return whether the round is over."""
        if self._in_two(attempt):
            self.tally.endings["cancelled after GO, and said so"] += 1
            await self._verify_alone(attempt.target)
            return True
        said = "" if code == 0 else await attempt.resolved()
        moved = any(one.claim is Claim.DONE for one in journals(Role.SOURCE, self.journal[1]))
        if "nothing to settle" not in said:
            require(moved is (not said or THERE in said), f"{said} where {moved=}")
        here, there = await self._which(attempt)
        self.say(f"--- {moved=} {here=} {there=} killed={attempt.killed}")
        require(not (here and there), "there are two of it")
        require(here is not moved, f"it {'runs' if here else 'does not run'} here, {moved=}")
        require(there is moved or attempt.killed, f"it is {'' if there else 'not '}there, {moved=}")
        if there:
            await self._verify(attempt.target)
        elif here:
            await self.source.wait_for_more()
        else:
            self.tally.endings["gone with the QEMU that was killed"] += 1
        return not here

    def _in_two(self, attempt: Attempt) -> bool:
        """Return whether QEMU was cancelled after GO, and migrate-src has said so.

        Without qmp that cannot be prevented.
        """
        return attempt.cancelled and not self.driven and IN_TWO in attempt.sender.err

    async def _which(self, attempt: Attempt) -> tuple[bool, bool]:
        """Return whether the guest runs here, and whether it is there.

        Both, or none, are returned only if that does not change for 5 s.
        """
        end = time.monotonic() + 5
        while True:
            here = bool((await self.source.execute("query-status"))["running"])
            there = await attempt.arrived()
            if here is not there or time.monotonic() > end:
                return here, there
            await asyncio.sleep(0.1)

    async def _verify(self, target: Machine) -> None:
        await compare(self.source, target)
        ours = await self.source.check_sweep(), self.source.counted()
        require(ours == (await target.check_sweep(), target.counted()), "they count differently")
        await target.cont()
        await target.wait_for_more()
        self.tally.compared += self.source.size

    async def _verify_alone(self, target: Machine) -> None:
        """Check a guest that cannot be compared: the one at the source has run on."""
        await target.wait_run_state("paused")
        memory = await target.read(self.sweep.start, self.sweep.size)
        self.sweep.check(memory)
        self.tally.compared += len(memory)


def qemu_round(chance: random.Random, tally: Tally, directory: Path) -> None:
    """Run a round. Raises Wrong, with all output."""
    move = QemuMove(chance, tally, directory)
    try:
        asyncio.run(move.run())
    except (AssertionError, MachineError, TimeoutError) as error:
        raise Wrong(f"{type(error).__name__} {error}\n{move.said}") from error

"""Commands of the user: how they are checked at the start, and how they end."""

import asyncio
import contextlib
import os

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.guests import command
from migrate.guests.command import check_command, run_command, start_service

PATIENCE = 20.0


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "text",
    ["", "true", "no-such-program-perhaps-later", "/bin/sh -c :", "  /bin/sh", "A=1 /no/such",
     "if true; then /no/such; fi", "$HOME/x", "'/no/such/thing'", "/no/such* now", "~/x", "(:)"],
)  # fmt: skip
def test_check_accepts_commands_that_may_run(text):
    check_command(text, "--on-complete")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("if", "the shell does not understand it"), ("(", "does not understand"),
        ("echo 'x", "does not understand"), ("/no/such now", "/no/such: No such file"),
        ("/etc/passwd", "/etc/passwd is not a program that can be run here"),
        (" /etc x", "/etc is not a program"), ("/etc/passwd/x", "Not a directory"),
    ],
)  # fmt: skip
def test_check_refuses_commands_that_cannot_run(text, says):
    with pytest.raises(UsageError, match=f"^--pause-cmd .*{says}"):
        check_command(text, "--pause-cmd")


@pytest.mark.asyncio
async def test_service_may_take_longer_than_other_commands(monkeypatch):
    monkeypatch.setattr(command, "COMMAND_PATIENCE", 0.01)
    await start_service("sleep 0.3", "x", 0, asyncio.Event())


@pytest.mark.asyncio
@pytest.mark.parametrize("why", ["time", "told"])
async def test_service_that_is_not_waited_for_runs_on(tmp_path, why):
    up, go = tmp_path / "up", tmp_path / "go"
    told = asyncio.Event()
    text = f"while [ ! -e {go} ]; do sleep 0.05; done; touch {up}"
    if why == "told":
        told.set()
    says = "is not waited for any longer" if why == "told" else "takes more than 0.1 s"
    with pytest.raises(MigrationError, match=rf"x .* {says}: it goes on, as process \d+"):
        await start_service(text, "x", 0.0 if why == "told" else 0.1, told)
    go.touch()
    await until(up.exists)


@pytest.mark.asyncio
async def test_service_gets_its_environment_and_its_status_is_checked(tmp_path):
    told = asyncio.Event()
    await start_service(f'echo "$WHERE" > {tmp_path}/x', "x", 0, told, WHERE="here")
    assert (tmp_path / "x").read_text() == "here\n"
    with pytest.raises(MigrationError, match="failed with status 3"):
        await start_service("exit 3", "x", 0, told)


def test_service_outlives_the_event_loop(tmp_path):
    """The loop kills its own processes when it is closed."""
    pid, go = tmp_path / "pid", tmp_path / "go"
    text = f"echo $$ > {pid}; while [ ! -e {go} ]; do sleep 0.05; done"
    with pytest.raises(MigrationError, match="goes on"):
        asyncio.run(start_service(text, "x", 0.3, asyncio.Event()))
    os.kill(int(pid.read_text()), 0)
    go.touch()


@pytest.mark.asyncio
async def test_command_that_takes_too_long_is_ended_with_its_children(tmp_path):
    """SIGTERM comes first, so that it can clean up. A child that ignores it is killed."""
    asked, child = tmp_path / "asked", tmp_path / "child"
    text = (
        f"trap 'touch {asked}; exit 1' TERM; (trap '' TERM; echo $$ >/dev/null; "
        f"exec sleep 1000) & echo $! > {child}; wait"
    )
    with pytest.raises(MigrationError, match=r"--pause-cmd .* did not end in 0\.5 s"):
        await run_command(text, "--pause-cmd", 0.5)
    assert asked.exists()

    def gone() -> bool:
        with contextlib.suppress(OSError), open(f"/proc/{int(child.read_text())}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "ZX"
        return True

    await until(gone)


@pytest.mark.asyncio
async def test_command_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(command, "END_SECONDS", 0.2)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(MigrationError, match="did not end"):
            await run_command("trap '' TERM; while :; do sleep 0.1; done", "x", 0.2)

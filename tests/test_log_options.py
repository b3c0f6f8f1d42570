"""Log records on standard error: the level of each, and tokens, which are never logged."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
from collections.abc import Iterator

import pytest

import migrate
import migrate.destination.attempts
from migrate.cli.log_options import LOGGERS, add_log_options, levels_of, start_logging
from migrate.cli.options import Parser
from migrate.errors import UsageError
from migrate.ownership.journal import name_of
from migrate.runtime.log_context import (
    SHOWN_CHARACTERS,
    MigrationFilter,
    name_migration,
    new_label,
)
from proto.wire.messages import TOKEN_BYTES
from tests.programs import Program, destination

RECORD = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00) ([A-Z]+) ([a-z_.]+) \[([0-9a-f]{8}|-)\] (.*)"
)


def parse(*words: str) -> argparse.Namespace:
    parser = Parser(prog="it")
    add_log_options(parser)
    return parser.parse_args(words)


@pytest.fixture
def loggers() -> Iterator[None]:
    """Restore the loggers, which belong to the whole process."""
    names = [*LOGGERS, "migrate.transport"]
    before = {name: (logging.getLogger(name).level, [*logging.getLogger(name).handlers])
              for name in names}  # fmt: skip
    yield
    for name, (level, handlers) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers


@pytest.mark.parametrize(
    ("words", "variable", "levels"),
    [
        ([], "", {}),
        (["-v"], "", dict.fromkeys(LOGGERS, "info")),
        (["-vv"], "", dict.fromkeys(LOGGERS, "debug")),
        (["-v", "--verbose", "-v"], "", dict.fromkeys(LOGGERS, "debug")),
        (["--log-level", "warning"], "", dict.fromkeys(LOGGERS, "warning")),
        (["-vv", "--log-level", "error"], "", dict.fromkeys(LOGGERS, "error")),
        ([], "DEBUG", dict.fromkeys(LOGGERS, "debug")),
        ([], "migrate.transport=debug", {"migrate.transport": "debug"}),
        ([], "info, proto=error,", {"migrate": "info", "proto": "error"}),
        (["-v"], "debug", dict.fromkeys(LOGGERS, "info")),
    ],
)  # fmt: skip
def test_levels_of_options_and_variable(words, variable, levels, monkeypatch):
    monkeypatch.setenv("MIGRATE_LOG", variable)
    assert levels_of(parse(*words)) == levels


@pytest.mark.parametrize("variable", ["loud", "migrate=", "asyncio=debug", "migrate.x=1", "=info"])
def test_variable_that_is_not_understood_is_a_usage_error(variable, monkeypatch):
    monkeypatch.setenv("MIGRATE_LOG", variable)
    with pytest.raises(UsageError, match="MIGRATE_LOG: .* is not understood: write LEVEL or"):
        levels_of(parse())


def test_option_that_is_not_understood_is_a_usage_error():
    with pytest.raises(UsageError, match="invalid choice: 'loud'"):
        parse("--log-level", "loud")


@pytest.mark.usefixtures("loggers")
def test_record_has_time_level_logger_and_migration(capsys):
    start_logging(parse("-v"))
    new_label()
    name_migration("0123456789abcdef")
    logging.getLogger("migrate.it").info("moved %d pages", 3)
    logging.getLogger("migrate.it").debug("not asked for")
    found = RECORD.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert found is not None
    assert found.groups()[1:] == ("INFO", "migrate.it", "01234567", "moved 3 pages")


@pytest.mark.usefixtures("loggers")
def test_logger_that_is_not_named_stays_silent(capsys, monkeypatch):
    monkeypatch.setenv("MIGRATE_LOG", "migrate.transport=info")
    start_logging(parse())
    logging.getLogger("migrate.source").error("not asked for")
    logging.getLogger("migrate.transport.link").info("asked for")
    err = capsys.readouterr().err
    assert "] asked for" in err
    assert "not asked for" not in err


@pytest.mark.usefixtures("loggers")
def test_nothing_is_logged_unless_asked_for(capsys, monkeypatch):
    monkeypatch.delenv("MIGRATE_LOG", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program
    start_logging(parse())
    logging.getLogger("migrate.it").error("an error")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("loggers")
def test_record_cannot_control_the_terminal(capsys):
    start_logging(parse("-v"))
    logging.getLogger("migrate.it").info("the peer said %s", "\x1b[2J\r")
    assert r"the peer said \x1b[2J\r" in capsys.readouterr().err


@pytest.mark.usefixtures("loggers")
def test_record_that_cannot_be_formatted_is_left_out(capsys):
    start_logging(parse("-v"))
    logging.getLogger("migrate").propagate = False  # pytest's own handler raises
    try:
        logging.getLogger("migrate.it").info("%d pages", "no number")
    finally:
        logging.getLogger("migrate").propagate = True
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the programs


def records(err: str) -> list[re.Match[str]]:
    return [found for line in err.splitlines() if (found := RECORD.fullmatch(line))]


def moved(*words: str) -> tuple[Program, Program]:
    """Move a small guest, with these words for both programs."""
    receiver, address = destination(*words)
    source = Program("migrate-src", "--guest", "demo:4m", "--downtime-limit", "1s", *words, address)
    assert source.wait() == 0, source.err
    assert receiver.wait() == 0, receiver.err
    return source, receiver


def test_frames_are_traced_in_both_directions_under_one_name():
    source, receiver = moved("-vv")
    names = []
    for program, sent, received in ((source, "GO", "RUNNING"), (receiver, "RUNNING", "GO")):
        found = records(program.err)
        frames = [one for one in found if one[3] == "migrate.transport.link"]
        texts = [one[5] for one in frames]
        assert any(re.fullmatch(rf"> 127\.0\.0\.1:\d+ {sent} \d+ bytes", text) for text in texts)
        assert any(
            re.fullmatch(rf"< 127\.0\.0\.1:\d+ {received} \d+ bytes", text) for text in texts
        )
        assert {one[2] for one in frames} == {"DEBUG"}
        assert {one[4] for one in frames if " PAGES " in one[5]} == {frames[-1][4]}
        names.append(frames[-1][4])
    assert names[0] == names[1] != "-"


@pytest.mark.programs
def test_no_frame_is_traced_with_one_v():
    for program in moved("-v"):
        assert not [one for one in records(program.err) if one[2] == "DEBUG"]


@pytest.mark.asyncio
async def test_journal_name_but_no_token_is_logged(caplog, monkeypatch):
    """With the token a stranger could resume a migration, or ask for its guest."""
    token = bytes(range(TOKEN_BYTES))
    monkeypatch.setattr(migrate.destination.attempts.os, "urandom", lambda _count: token)
    caplog.set_level(logging.DEBUG, "migrate")
    caplog.handler.addFilter(MigrationFilter())
    address = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(migrate.receive("127.0.0.1:0", listening=address.set_result))
        await migrate.send(migrate.BufferGuest(bytearray(8192)), str(await address))
    assert " ACCEPT " in caplog.text
    assert caplog.records[-1].migration == name_of(token)[:SHOWN_CHARACTERS]
    assert token.hex() not in caplog.text
    assert repr(token)[2:-1] not in caplog.text

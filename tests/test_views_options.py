"""The views that options ask for, and a view that fails."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from migrate.cli.source_options import source_parser
from migrate.events import Notice
from migrate.views import events, options, report
from migrate.views.options import Views, wants_live
from migrate.views.progress import Lines
from tests.story import story

PLAIN = ["--progress", "plain", "tcp:h:1"]


def views(*arguments: str) -> Views:
    return Views(source_parser().parse_args([*arguments, *PLAIN]))


def tell(seen: Views) -> None:
    seen.describe({"guest": "g", "destination": "tcp:h:1"})
    for event, s in story():
        seen.end(s) if event == "end" else seen.observe(event, s)


@pytest.mark.programs
def test_failing_view_is_dropped(capsys, monkeypatch, tmp_path):
    class Broken:
        calls = 0

        def describe(self, _facts):
            self.calls += 1
            raise RuntimeError("it fell over")

        observe = end = describe

    broken = Broken()
    monkeypatch.setattr(events, "Events", lambda *_: broken)
    words = ["--report", str(tmp_path / "r.html"), "--metrics-textfile", str(tmp_path / "m")]
    seen = views("--events", "json:2", *words)
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert broken.calls == 1
    assert said.count("--events has failed: it fell over") == 1
    assert "3 took" in said
    assert {"r.html", "m"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("verb", ["describe", "observe", "end", "say", "clear", "close"])
def test_failing_text_view_becomes_lines(capsys, monkeypatch, verb):
    class Broken:
        def __getattr__(self, name):
            def act(*_arguments):
                if name == verb:
                    raise RuntimeError("it fell over")

            return act

    views_made = iter([Broken()])
    monkeypatch.setattr(
        options, "Lines", lambda *args, **how: next(views_made, None) or Lines(*args, **how)
    )
    seen = views()
    seen.say("a sentence")
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert said.count("the live view has failed: it fell over") == (verb != "say")
    assert ("a sentence" in said) == (verb == "say")


def test_failure_at_the_end_is_reported(capsys, monkeypatch, tmp_path):
    class Broken:
        def close(self):
            raise RuntimeError("it fell over")

        def describe(self, *_arguments):
            pass

        observe = end = describe

    monkeypatch.setattr(report, "Report", lambda *_: Broken())
    seen = views("--report", str(tmp_path / "r.html"))
    tell(seen)
    seen.close()
    assert "--report has failed: it fell over" in capsys.readouterr().err


@pytest.mark.programs
def test_foreign_text_is_printable(capsys, tmp_path):
    seen = views("--report", str(tmp_path / "r.html"))
    seen.describe({"guest": "\x1b[2J\udcff", "destination": "tcp:h:1"})
    for event, s in story():
        seen.end(s) if event == "end" else seen.observe(event, s)
        if event == "paused":
            seen.observe(Notice("\x1b]0;title\x07\n"), s)
    seen.close()
    page = (tmp_path / "r.html").read_text("utf-8")
    assert r"\x1b[2J\xff" in page
    for text in (page, capsys.readouterr().err):
        assert r"\x1b]0;title\x07\n" in text
        assert "\x1b" not in text


def test_textfile_failure_is_reported_once_and_retried(capsys, tmp_path):
    path = tmp_path / "directory" / "metrics"
    path.parent.mkdir()
    seen = views("--metrics-textfile", str(path))
    path.unlink()
    path.parent.rmdir()
    tell(seen)
    tell(seen)
    path.parent.mkdir()
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert said.count("--metrics-textfile has failed: No such file or directory") == 1
    assert path.exists()


@pytest.mark.programs
def test_full_disk_at_the_end_is_reported(capsys, tmp_path):
    seen = views("--report", str(tmp_path / "r.html"), "--metrics-textfile", str(tmp_path / "m"))
    (tmp_path / "m").unlink()
    tmp_path.rmdir()
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert "--report: No such file or directory" in said
    assert "--metrics-textfile has failed: No such file or directory" in said


def test_two_migrations_in_one_program(capsys):
    seen = views()
    tell(seen)
    tell(seen)
    assert seen.history.migrations == 2
    assert capsys.readouterr().err.count("3 took") == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("mode", "term", "terminal", "live"),
    [
        ("auto", "xterm", True, True),
        ("auto", "dumb", True, False),
        ("auto", None, True, False),
        ("auto", "xterm", False, False),
        ("plain", "xterm", True, False),
        ("never", "xterm", True, False),
    ],
)
def test_choice_of_live_view(monkeypatch, mode, term, terminal, live):
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert wants_live(mode, Terminal() if terminal else io.StringIO()) is live


def test_terminal_without_box_characters_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for encoding in ("ascii", "iso-8859-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        assert not wants_live("auto", stream)


@pytest.mark.parametrize(
    ("program", "side"), [("migrate_src", "source"), ("migrate_dst", "destination")]
)
def test_help_imports_nothing_heavy(program, side):
    code = (
        "import sys\n"
        f"from migrate.cli import {program}, {side}_options\n"
        f"{side}_options.{side}_parser().format_help()\n"
        "print(sorted({'rich', 'prometheus_client', 'matplotlib', 'uvloop'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"

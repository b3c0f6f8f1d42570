"""All views as one: what is asked for is made, and one that fails stops nothing."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from migrate.cli.source_words import source_parser
from migrate.views.options import Views, wants_live
from tests.story import story

PLAIN = ["--progress", "plain", "tcp:h:1"]


def views(*arguments: str) -> Views:
    return Views(source_parser().parse_args([*arguments, *PLAIN]))


def tell(seen: Views) -> None:
    seen.describe({"guest": "g", "destination": "tcp:h:1"})
    for event, s in story():
        seen.end(s) if event == "end" else seen.observe(event, s)


def test_a_view_that_fails_is_left_out_and_the_others_go_on(capsys, tmp_path):
    seen = views("--report", str(tmp_path / "r.html"), "--metrics-textfile", str(tmp_path / "m"))

    class Broken:
        calls = 0

        def describe(self, _facts):
            self.calls += 1
            raise RuntimeError("it fell over")

        observe = end = describe

    broken = Broken()
    seen._views["--events"] = broken
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert broken.calls == 1
    assert said.count("--events goes no further: it fell over") == 1
    assert "3 took" in said
    assert {"r.html", "m"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("verb", ["describe", "observe", "end", "say", "clear", "close"])
def test_a_drawing_that_fails_goes_on_as_lines(capsys, verb):
    seen = views()

    class Broken:
        def __getattr__(self, name):
            def act(*_arguments):
                if name == verb:
                    raise RuntimeError("it fell over")

            return act

    seen._text = Broken()
    seen.say("a sentence")
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert said.count("the live view goes no further: it fell over") == (verb != "say")
    assert ("a sentence" in said) == (verb == "say")


def test_a_view_that_fails_at_the_end_is_said(capsys):
    seen = views()

    class Broken:
        def close(self):
            raise RuntimeError("it fell over")

        def describe(self, *_arguments):
            pass

        observe = end = describe

    seen._views["--report"] = Broken()
    tell(seen)
    seen.close()
    assert "--report goes no further: it fell over" in capsys.readouterr().err


def test_what_views_show_of_others_is_printable(capsys, tmp_path):
    seen = views("--report", str(tmp_path / "r.html"))
    seen.describe({"guest": "\x1b[2J\udcff", "destination": "tcp:h:1"})
    for event, s in story():
        seen.end(s) if event == "end" else seen.observe(event, s)
        if event == "paused":
            seen.observe("notice: \x1b]0;title\x07\n", s)
    seen.close()
    page = (tmp_path / "r.html").read_text("utf-8")
    assert r"\x1b[2J\xff" in page
    for text in (page, capsys.readouterr().err):
        assert r"\x1b]0;title\x07\n" in text
        assert "\x1b" not in text


def test_metrics_that_cannot_be_written_are_said_once_and_tried_again(capsys, tmp_path):
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
    assert said.count("--metrics-textfile goes no further: No such file or directory") == 1
    assert path.exists()


def test_a_disk_that_is_full_at_the_end_is_said(capsys, tmp_path):
    seen = views("--report", str(tmp_path / "r.html"), "--metrics-textfile", str(tmp_path / "m"))
    (tmp_path / "m").unlink()
    tmp_path.rmdir()
    tell(seen)
    seen.close()
    said = capsys.readouterr().err
    assert "--report: No such file or directory" in said
    assert "--metrics-textfile goes no further: No such file or directory" in said


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
def test_where_there_is_a_live_view(monkeypatch, mode, term, terminal, live):
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert wants_live(mode, Terminal() if terminal else io.StringIO()) is live


def test_a_terminal_without_the_letters_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for encoding in ("ascii", "iso-8859-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        assert not wants_live("auto", stream)


@pytest.mark.parametrize("program", ["source", "destination"])
def test_help_loads_nothing_heavy(program):
    code = (
        "import sys\n"
        f"from migrate.cli import {program} as it\n"
        f"it.{program}_parser().format_help()\n"
        "print(sorted({'rich', 'prometheus_client', 'matplotlib', 'uvloop'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"

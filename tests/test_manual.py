"""The man pages say all that the parsers do, and groff and mandoc find nothing to complain of."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.manual.__main__ import write
from migrate.manual.man import escape, exit_codes, page
from migrate.manual.parsers import Kind, Option, Program, Values, programs, read, values
from tests.requirements import need_program

ROOT = Path(__file__).parent.parent
PAGES = [branch for one in programs() for branch in (one, *one.subcommands)]
DATE = "2026-01-02"


def text_of(page: str) -> str:
    """Return a page as text, formatted for a terminal wide enough for every line."""
    found = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=1000n"], input=page,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return found.stdout


def section(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no {title}"
    return found[1]


@pytest.fixture(params=PAGES, ids=lambda program: program.page)
def program(request) -> Program:
    return request.param


@pytest.mark.parametrize(
    "check",
    [
        ["mandoc", "-Tlint"],
        ["groff", "-man", "-ww", "-z", "-Tascii"],
        ["groff", "-man", "-ww", "-z", "-Tutf8", "-rLL=60n"],
        ["man", "--warnings", "--local-file"],
    ],
    ids=" ".join,
)
def test_groff_and_mandoc_accept_pages(program, check, tmp_path):
    need_program(check[0])
    path = tmp_path / f"{program.page}.1"
    path.write_text(page(program, ["migrate-ctl"], DATE))
    found = subprocess.run([*check, path], capture_output=True, text=True, timeout=60, check=False)
    assert not found.stderr
    assert check[0] == "man" or not found.stdout


def test_page_has_all_options(program):
    need_program("groff")
    options = section(text_of(page(program, [], DATE)), "OPTIONS")
    plain = " ".join(options.split())
    for option in program.options:
        heading = ", ".join(f"{name} {option.takes}".strip() for name in option.names)
        assert f"{heading} {' '.join(option.help.split())}" in plain


def test_page_sections(program):
    need_program("groff")
    text = text_of(page(program, ["migrate-ctl"], DATE))
    assert f"{program.page} - " in section(text, "NAME")
    assert section(text, "SYNOPSIS").strip().startswith(f"{program.name} ")
    assert "migrate-ctl(1)" in section(text, "SEE ALSO")
    codes = dict(line.split(maxsplit=1) for line in section(text, "EXIT STATUS").splitlines()
                 if line.strip())  # fmt: skip
    assert codes["2"] == "usage"
    for argument in program.arguments:
        assert argument.takes in section(text, "DESCRIPTION")


def test_examples_are_verbatim():
    need_program("groff")
    destination = PAGES[2]
    assert destination.name == "migrate-dst"
    line = "migrate-dst --listen 4444 --output /dev/shm/db --on-complete 'systemctl start db'"
    assert line in section(text_of(page(destination, [], DATE)), "EXAMPLES")


def test_every_environment_variable_is_in_a_page():
    used = set()
    for source in (ROOT / "migrate").rglob("*.py"):
        if "manual" not in source.parts:
            used |= set(re.findall(r'"(MIGRATE_[A-Z_]+)"', source.read_text()))
    assert "MIGRATE_JOURNAL" in used
    told = "".join(page(one, [], DATE) for one in PAGES)
    assert {name for name in used if name not in told} == set()


def test_all_exit_codes_are_listed():
    from migrate.cli.exit_codes import CODES

    assert [int(code) for code, _ in exit_codes(CODES)] == [*range(11), 129, 130, 143]


# ---------------------------------------------------------------- text


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=60))
def test_escape_any_text(text):
    words = " ".join(text.split())
    if words:
        escaped = escape(words)
        assert escaped[0] not in ".'"
        meant = {"&": "", "e": "\\", "-": "-", "(ha": "^", "(ti": "~", "(ga": "`"}
        unescaped = re.sub(
            r"\\(&|e|-|\(ha|\(ti|\(ga)", lambda found: meant[found[1]], escaped
        )  # fmt: skip
        assert unescaped == words


@pytest.mark.parametrize(
    ("metavar", "meant"),
    [
        ("DIR", Values(found=(("", Kind.DIRECTORY),))),
        ("PATH", Values(found=(("", Kind.FILE),))),
        ("FILE.html", Values(found=(("", Kind.FILE),))),
        ("stdio|unix:PATH", Values(("stdio",), (("unix:", Kind.FILE),))),
        ("tcp:HOST:PORT|unix:PATH", Values(("tcp:",), (("unix:", Kind.FILE),))),
        ("[HOST:]PORT|unix:PATH", Values(found=(("unix:", Kind.FILE),))),
        ("SIZE|auto", Values(("auto",))),
        ("HOST:PORT", Values()),
        ("SIZE", Values()),
        ("", Values()),
    ],
)
def test_values_of_a_metavar(metavar, meant):
    assert values(metavar) == meant


@given(st.text())
def test_values_of_any_metavar(metavar):
    for prefix, kind in values(metavar).found:
        assert prefix + kind.value in metavar or kind is Kind.FILE


def test_read_parser():
    parser = argparse.ArgumentParser(prog="it", description="Does it.")
    parser.add_argument("where", metavar="PATH")
    parser.add_argument("-o", "--one", action="append", metavar="DIR", help="100 %% of %(prog)s")
    parser.add_argument("--two", choices=["a", "b"], default="a", help="this")
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    read_ = read(parser)
    assert (read_.name, read_.description, len(read_.options)) == ("it", "Does it.", 3)
    assert read_.options[1] == Option(
        ("-o", "--one"), "DIR", "100 % of it", values("DIR"), repeatable=True
    )
    assert read_.options[2].help == "this (default: a)"
    assert read_.options[2].takes == "a|b"
    assert read_.options[2].values.words == ("a", "b")
    assert read_.arguments[0].required


# ---------------------------------------------------------------- writing


def test_writing_needs_no_other_package(tmp_path):
    """As it is when a wheel is built: there is nothing compiled and nothing installed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = sys.argv[2:]\n"
        "from migrate.manual.__main__ import main; main()\n"
        "bad = {'uvloop', 'msgspec', 'xxhash', 'proto.codec._xbzrle', 'migrate.memory._memory'}\n"
        "assert not bad & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, ROOT, tmp_path],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    names = found.stdout.split()
    assert {"man/man1/migrate-src-resolve.1", "zsh/site-functions/_migrate-ctl"} < set(names)
    assert all((tmp_path / name).stat().st_size for name in names)


def test_source_date_epoch_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    for name in write(tmp_path / "one"):
        assert name in write(tmp_path / "other")
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert '"2001-09-09"' in (tmp_path / "one/man/man1/migrate-ctl.1").read_text()


def test_security_document_names_existing_tests() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = set(re.findall(r"tests/test_\w+\.py", text))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []

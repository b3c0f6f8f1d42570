"""The man pages, in the man macros that both groff and mandoc have."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from migrate.cli.options import VERSION
from migrate.manual.parsers import Option, Program

# Columns of a line before escapes are added: mandoc complains of more than 80.
WIDTH = 70
_ESCAPES = {"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga"}

# The variables and files that matter to a program with this option.
ENVIRONMENT = {
    "--journal": [
        ("MIGRATE_JOURNAL", "the directory of the journals, unless --journal names one"),
        ("XDG_STATE_HOME", "other users than root have their journals in xbmigrate below it"),
        ("MIGRATE_COREDUMPS", "1 allows core dumps, which contain the guest's memory"),
    ],
    "--log-level": [
        ("MIGRATE_LOG", "what is logged: LEVEL, or LOGGER=LEVEL pairs separated by commas"),
    ],
    "--tls-creds": [
        ("MIGRATE_REQUIRE_TLS", "1 refuses plain TCP to and from another host"),
    ],
}
FILES = {
    "--journal": [
        ("/var/lib/xbmigrate", "the journals, for root"),
        ("~/.local/state/xbmigrate", "the journals, for other users"),
    ],
    "--tls-creds": [
        ("DIR/ca-cert.pem", "in the directory of --tls-creds: the authority that both sides trust"),
        ("DIR/server-cert.pem, DIR/server-key.pem", "certificate of migrate-dst and its key"),
        ("DIR/client-cert.pem, DIR/client-key.pem", "certificate of migrate-src and its key"),
        ("DIR/ca-crl.pem", "revoked certificates; the file may be missing"),
    ],
}


def page(program: Program, others: list[str], date: str) -> str:
    """Return the text of a page.

    others -- the pages under SEE ALSO
    date   -- YYYY-MM-DD
    """
    lines = [
        f'.TH {program.page.upper()} 1 "{date}" "xbmigrate {VERSION}" "User Commands"',
        ".nh",  # no hyphenation: users search for names of options and variables
        ".ad l",
        ".SH NAME",
        f"{escape(program.page)} \\- {escape(_clause(program.description))}",
        ".SH SYNOPSIS",
        *_synopsis(program),
        ".SH DESCRIPTION",
        *_filled(program.description),
    ]
    for argument in program.arguments:
        lines += _tagged(_taken(argument.takes), argument.help)
    if program.subcommands:
        lines.append(".SH SUBCOMMANDS")
        for one in program.subcommands:
            lines += _tagged(f"\\fB{escape(one.name)}\\fR", f"{one.description} See {one.page}(1).")
    lines.append(".SH OPTIONS")
    for option in program.options:
        lines += _tagged(_heading(option), option.help)
    lines += _epilog(program.epilog)
    lines += _used("ENVIRONMENT", ENVIRONMENT, program)
    lines += _used("FILES", FILES, program)
    lines += [".SH SEE ALSO", *_also(others)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Return `text` as input of groff, with its special characters escaped."""
    text = "".join(_ESCAPES.get(one, one) for one in text)
    return rf"\&{text}" if text[:1] in (".", "'") else text


def _also(others: list[str]) -> Iterator[str]:
    for name in others:
        yield f".BR {escape(name)} (1){',' if name != others[-1] else ''}"


def _clause(description: str) -> str:
    """Return what a program does, as whatis lists it."""
    first = re.split(r"\. |: | while |\.$", description)[0]
    return first[:1].lower() + first[1:]


def _synopsis(program: Program) -> Iterator[str]:
    yield f'.SY "{escape(program.name)}"'
    for option in program.options:
        if option.required:
            yield _heading(option)
    yield r".RI [ option\ .\|.\|. ]"
    for argument in program.arguments:
        text = _taken(argument.takes)
        yield text if argument.required else f"[{text}]"
    yield ".YS"


def _heading(option: Option) -> str:
    takes = f" {_taken(option.takes)}" if option.takes else ""
    return ", ".join(f"\\fB{escape(name)}\\fR{takes}" for name in option.names)


def _taken(takes: str) -> str:
    """Return a metavar: placeholders in italics, literal text in bold."""
    parts = re.split(r"([A-Z]+(?:/[A-Z]+)?)", takes)
    return "".join(
        f"\\fI{part}\\fR" if part[0].isupper() else f"\\fB{escape(part)}\\fR"
        if part[0].islower() else escape(part)
        for part in parts if part
    )  # fmt: skip


def _tagged(heading: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield heading
    yield from _filled(text or "See above.")


def _filled(text: str) -> Iterator[str]:
    """Give the lines of running text. A long word may break before a bracket, not at a hyphen."""
    for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False):
        yield re.sub(r"(?<=\S)\[", r"\:[", escape(line))


def _epilog(epilog: str) -> Iterator[str]:
    """Give the epilog's paragraphs: exit codes as a list, others as they are typed."""
    for heading, body in re.findall(r"^(\S[^\n]*):\n((?:[ \t]+[^\n]*(?:\n|$)|\n)+)", epilog, re.M):
        if heading == "exit codes":
            yield ".SH EXIT STATUS"
            for code, meaning in exit_codes(body):
                yield from _tagged(f"\\fB{code}\\fR", meaning)
            continue
        yield f".SH {escape(heading.upper())}"
        yield ".EX"
        yield from (escape(line) for line in textwrap.dedent(body).strip("\n").split("\n"))
        yield ".EE"


def exit_codes(body: str) -> list[tuple[str, str]]:
    """Return (code, meaning) of each cell of a table such as `0 done    1 failed`."""
    cells = [cell for line in body.splitlines() for cell in re.split(r"\s{2,}", line.strip())]
    pairs = [tuple(cell.split(" ", 1)) for cell in cells if cell]
    return [(code, meaning) for code, meaning in pairs]


def _used(title: str, table: dict[str, list[tuple[str, str]]], program: Program) -> Iterator[str]:
    names = {name for option in program.options for name in option.names}
    entries = [entry for option, found in table.items() if option in names for entry in found]
    if entries:
        yield f".SH {title}"
    for name, meaning in entries:
        yield from _tagged(f"\\fB{escape(name)}\\fR", f"{meaning}.")

"""Completion, by asking real shells what they offer when a user presses Tab."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.manual.__main__ import write
from migrate.manual.parsers import Program, programs
from proto.wire.capabilities import OPTIONAL
from tests.requirements import need_program

PROGRAMS = programs()
BRANCHES = [branch for one in PROGRAMS for branch in (one, *one.subcommands)]

# Splits the line as readline does, calls what `complete -p` names, prints what it answers.
BASH = r"""
source "$1"
line=$2 COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDS=()
while [[ $line ]]; do
    if [[ $line =~ ^[[:space:]]+ ]]; then :
    elif [[ $line =~ ^[=:]+ || $line =~ ^[^[:space:]=:]+ ]]; then COMP_WORDS+=("${BASH_REMATCH[0]}")
    fi
    line=${line#"${BASH_REMATCH[0]}"}
done
[[ $2 == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
[[ $(complete -p "$3") =~ -F\ ([^ ]+) ]] && "${BASH_REMATCH[1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
# compadd adds what matches: it is written down on its way.
ZSH = r"""
PS1='ready for it'; bindkey -e
fpath=({share}/zsh/site-functions $fpath)
autoload -U compinit; compinit -u -D
compadd() {{
    local -a hits
    [[ -n ${{@[(r)-[OAD]]}} ]] || {{
        builtin compadd -O hits "$@"
        print -rl -- $IPREFIX$^hits >> {answers}
    }}
    builtin compadd "$@"
}}
ended() {{ print the end >> {answers} }}
comppostfuncs=(ended)
zle -C asked complete-word _main_complete
bindkey '^I' asked
"""


@pytest.fixture(scope="module")
def share(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    write(directory)
    return directory


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory to complete names in."""
    (tmp_path / "certificates").mkdir()
    (tmp_path / "crate.mem").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bash(share: Path, line: str) -> set[str]:
    """Return the words that bash would complete the last one to."""
    program = line.split(maxsplit=1)[0]
    found = subprocess.run(
        ["bash", "--norc", "-c", BASH, "ask", share / "bash-completion/completions" / program,
         line, program],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert not found.stderr
    last = line[line.rfind(" ") + 1 :]
    kept = last[: max(last.rfind("="), last.rfind(":")) + 1]
    return {kept + one for one in found.stdout.splitlines() if one}


def fish(share: Path, line: str) -> set[str]:
    program = line.split(maxsplit=1)[0]
    script = share / "fish/vendor_completions.d" / f"{program}.fish"
    found = subprocess.run(
        ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", script, line],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert not found.stderr
    return {one.partition("\t")[0] for one in found.stdout.splitlines()}


def zsh(share: Path, line: str) -> set[str]:
    """Type the line and a Tab on a new terminal; return the words that zsh offers."""
    home = share / "zsh-home"
    home.mkdir(exist_ok=True)
    answers = home / "answers"
    answers.unlink(missing_ok=True)
    (home / ".zshrc").write_text(ZSH.format(share=share, answers=answers))
    child, terminal = pty.fork()
    if child == 0:
        environment = {**os.environ, "ZDOTDIR": str(home), "TERM": "dumb"}
        os.execvpe("zsh", ["zsh", "-d", "-i"], environment)
    try:
        seen = _read_until(terminal, lambda text: "ready for it" in text)
        os.write(terminal, f"{line}\t".encode())
        seen += _read_until(
            terminal, lambda _: answers.exists() and "the end" in answers.read_text()
        )
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
    return set(answers.read_text().splitlines()) - {"the end", ""}


def _read_until(terminal: int, there: Callable[[str], bool]) -> str:
    """Return what a terminal shows until `there` holds for it. Fail if the shell hangs."""
    seen, end = "", time.monotonic() + 60
    while not there(seen):
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.02)[0]:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
    return seen


@pytest.fixture(params=[bash, zsh, fish], ids=lambda shell: shell.__name__)
def ask(request, share, place) -> Callable[[str], set[str]]:
    """Return a function that asks a shell how to complete a line; directories have no final /."""
    need_program(request.param.__name__)
    return lambda line: {one.removesuffix("/") for one in request.param(share, line)}


@pytest.mark.programs
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.page)
def test_every_option_is_offered(ask, branch: Program):
    expected = {n for option in branch.options for n in option.names if n.startswith("--")}
    assert {"--help"} < expected
    answered = ask(f"{branch.name} --")
    assert {one.removesuffix("=") for one in answered} == expected


@pytest.mark.programs
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.page)
def test_choices_are_offered(ask, branch: Program):
    for option in branch.options:
        if option.values.words and not option.values.found:
            for line in (f"{option.names[-1]} ", f"{option.names[-1]}="):
                answered = ask(f"{branch.name} {line}")
                whole = {one.removeprefix(f"{option.names[-1]}=") for one in answered}
                assert whole == set(option.values.words), line


@pytest.mark.programs
@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("migrate-src --jour", {"--journal"}),
        ("migrate-src --journal ", {"certificates"}),
        ("migrate-src --tls-creds=cert", {"--tls-creds=certificates"}),
        ("migrate-dst --listen 4444 --output c", {"certificates", "crate.mem"}),
        ("migrate-src --guest ", {"demo", "demo:", "demo:pid=", "file:"}),
        ("migrate-src --guest file:cra", {"file:crate.mem"}),
        ("migrate-src --qmp unix:cra", {"unix:crate.mem"}),
        ("migrate-src --qmp=unix:cra", {"--qmp=unix:crate.mem"}),
        ("migrate-src --capability xbzrle-merge=o", {"xbzrle-merge=on", "xbzrle-merge=off"}),
        ("migrate-src --progress pl", {"plain"}),
        ("migrate-src --pause-cmd pyth", {"python3"}),
        ("migrate-src ", {"resolve", "tcp:", "unix:"}),
        ("migrate-src --guest file:crate.mem --json unix:cra", {"unix:crate.mem"}),
        ("migrate-dst resol", {"resolve"}),
        ("migrate-src resolve --keep ", {"source", "destination"}),
        ("migrate-src resolve 0123 unix:cra", {"unix:crate.mem"}),
        ("migrate-dst resolve --proof cra", {"crate.mem"}),
        ("migrate-ctl cra", {"crate.mem"}),
        ("migrate-ctl crate.mem query-s", {"query-status"}),
    ],
)  # fmt: skip
def test_completion_of_a_line(ask, line, answers):
    answered = ask(line)
    if "cmd" in line:  # this system has others too
        assert answers & {re.sub(r"python3.*", "python3", one) for one in answered}
    else:
        assert answered == answers


def test_pid_offers_running_processes(ask):
    assert str(os.getpid()) in ask(f"migrate-src --pid {str(os.getpid())[0]}")


def test_congestion_offers_what_the_kernel_has(ask):
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    assert ask("migrate-src --congestion ") == set(known)


def test_commands_are_asked_of_the_running_program(ask, place, monkeypatch):
    """The program that answers knows commands that our parser does not."""
    program = place / "bin" / "migrate-ctl"
    program.parent.mkdir()
    program.write_text(
        """#!/bin/sh
[ "$*" = 'crate.mem --timeout 1s query-commands' ] && echo '[{"name": "dance"}, {"name": "sing"}]'
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert ask("migrate-ctl crate.mem ") >= {"dance", "sing", "wait"}


def test_nothing_is_offered_for_free_values(ask):
    assert ask("migrate-src --cache-size 6") == set()


def test_all_capabilities_are_offered():
    offered = next(one for one in PROGRAMS[0].options if "--capability" in one.names)
    assert {word.partition("=")[0] for word in offered.values.words} == OPTIONAL


def test_bash_quotes_file_names(share, place):
    """On a terminal, since readline quotes them."""
    (place / "two words").mkdir()
    child, terminal = pty.fork()
    if child == 0:
        environment = {**os.environ, "PS1": "ready for it", "TERM": "dumb"}
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    try:
        _read_until(terminal, lambda text: "ready for it" in text)
        os.write(terminal, f". {share}/bash-completion/completions/migrate-src\n".encode())
        _read_until(terminal, lambda text: "ready for it" in text)
        os.write(terminal, b"migrate-src --guest=file:tw\t")
        assert _read_until(terminal, lambda text: r"file:two\ words/" in text)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)

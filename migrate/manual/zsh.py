"""The completion for zsh: specifications for _arguments, and a state for each thing to be found."""

from __future__ import annotations

import re
import shlex
from string import Template

from migrate.manual.parsers import Kind, Option, Program, Values

SCRIPT = Template(r"""#compdef $PROG
# zsh completion for $PROG, made from its parser

${NAME}_behind() {  # PREFIX COMMAND...: completes with the command what stands behind the prefix
    local prefix=$$1
    shift
    if [[ -z $$prefix ]] || compset -P $$prefix; then
        "$$@"
    else
        compadd -S '' -- $$prefix
    fi
}

${NAME}_asked() {  # what the program on that socket says it can do
    local answer
    answer=$$($PROG $$line[1] --timeout 1s query-commands 2>/dev/null)
    compadd -- $${(f)"$$(grep -o '"name": *"[^"]*"' <<< $$answer | cut -d'"' -f4)"}
}

$NAME() {
    local curcontext=$$curcontext state state_descr line ret=1
    local -A opt_args
    case $${words[2]}:$$((CURRENT > 2)) in
$BRANCHES
    esac
    return ret
}

if [[ $$zsh_eval_context[-1] == eval || $$zsh_eval_context[-1] == file ]]; then
    compdef $NAME $PROG  # it was sourced
else
    $NAME "$$@"
fi
""")
BRANCH = Template(r"""    $PATTERN)
        ${SHIFT}_arguments -C -s -S \
            $SPECIFICATIONS && ret=0
        case $$state in
$STATES
        esac
        ;;""")
_FOUND = {
    Kind.FILE: "_files",
    Kind.DIRECTORY: "_files -/",
    Kind.COMMAND: "_command_names -e",
    Kind.PROCESS: "compadd -- /proc/<->(N:t)",  # _pids has this terminal's alone
    Kind.CONGESTION: "compadd -- "
    "${=:-$(cat /proc/sys/net/ipv4/tcp_available_congestion_control 2>/dev/null)}",
    Kind.ASKED: "{name}_asked",
}


def script(program: Program) -> str:
    """Return what zsh loads from its fpath when a user first completes the program."""
    name = f"_{program.page.replace('-', '_')}"
    branches = [_branch(f"{_word(one)}:1", one, name) for one in program.subcommands]
    branches.append(_branch("*", program, name))
    return SCRIPT.substitute(NAME=name, PROG=program.name, BRANCHES="\n".join(branches))


def _word(subcommand: Program) -> str:
    return subcommand.name.split()[-1]


def _branch(pattern: str, program: Program, name: str) -> str:
    states: dict[str, str] = {}
    specifications = []
    for place, argument in enumerate(program.arguments, 1):
        first = " ".join(_word(one) for one in program.subcommands) if place == 1 else ""
        state = _state(f"argument-{place}", argument.values, name, states, first)
        specifications.append(f"{place}:{_plain(argument.takes)}:{state}")
    if program.subcommands and not program.arguments:
        words = " ".join(_word(one) for one in program.subcommands)
        specifications.append(f"1::subcommand:({words})")
    for option in program.options:
        specifications += _specifications(option, name, states)
    return BRANCH.substitute(
        PATTERN=pattern,
        SHIFT="shift words; ((CURRENT--)); " if " " in program.name else "",
        SPECIFICATIONS=" \\\n            ".join(map(shlex.quote, specifications)),
        STATES="\n".join(f"        {state}) {answer} ;;" for state, answer in states.items()),
    )


def _specifications(option: Option, name: str, states: dict[str, str]) -> list[str]:
    """Return one per name. Once one name is typed, the others are no longer offered."""
    repeated = "*" if option.repeatable else ""
    alone = f"({' '.join(option.names)})" if len(option.names) > 1 and not repeated else ""
    takes = ""
    if option.takes:
        state = _state(option.names[-1].lstrip("-"), option.values, name, states)
        takes = f":{_plain(option.takes)}:{state}"
    return [
        f"{alone}{repeated}{one}{'=' if takes and one.startswith('--') else ''}"
        f"[{_plain(option.help)}]{takes}"
        for one in option.names
    ]


def _state(state: str, taken: Values, name: str, states: dict[str, str], first: str = "") -> str:
    """Return the action of a value, and add what its state does to `states`."""
    steps = [f"compadd -- {first} && ret=0"] if first else []
    if whole := [word for word in taken.words if word[-1] not in ":="]:
        steps.append(f"compadd -- {shlex.join(whole)} && ret=0")
    if begun := [word for word in taken.words if word[-1] in ":="]:
        steps.append(f"compadd -S '' -- {shlex.join(begun)} && ret=0")
    steps += [
        f"{name}_behind {shlex.quote(prefix)} {_FOUND[kind].replace('{name}', name)} && ret=0"
        for prefix, kind in taken.found
    ]
    if not steps:
        return " "
    states[state] = "; ".join(steps)
    return f"->{state}"


def _plain(text: str) -> str:
    """Return `text` for a specification, where brackets and colons are special."""
    return re.sub(r"([\\\[\]:])", r"\\\1", text)

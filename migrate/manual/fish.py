"""The completion for fish: a line per option, and functions for values behind a prefix."""

from __future__ import annotations

from string import Template

from migrate.manual.parsers import Kind, Option, Program, Values

SCRIPT = Template(r"""# fish completion for $PROG, made from its parser

# The words before the cursor that are no options: their number, a subcommand not counted.
function ${NAME}_arguments
    set -l option ''
    for one in (commandline -opc)[2..-1]
        if test -n "$$option"
            set option ''
        else if string match -q -- '-?*' $$one
            contains -- $$one $TAKES
            and set option $$one
        else
            echo $$one
        end
    end
end

function ${NAME}_in  # SUBCOMMAND or ''
    set -l first (commandline -opc)[2]
    contains -- "$$first" $SUBCOMMANDS
    or set first ''
    test "$$first" = "$$argv[1]"
end

function ${NAME}_place  # SUBCOMMAND NUMBER: whether this argument stands at the cursor
    ${NAME}_in $$argv[1]
    and test (count (${NAME}_arguments)) -eq $$argv[2]
end

# What is typed of the value at the cursor, without the option or the prefix before it.
function ${NAME}_typed
    commandline -ct | string replace -r -- '^--[a-z-]+=' ''
end

function ${NAME}_behind  # PREFIX COMMAND...: what the command finds, given what is typed after it
    set -l typed (${NAME}_typed)
    set -l prefix $$argv[1]
    if not string match -q -- "$$prefix*" "$$typed"
        echo $$prefix
        return
    end
    set -l rest (string sub -s (math (string length -- "$$prefix") + 1) -- "$$typed")
    printf '%s\n' $$prefix($$argv[2..-1] "$$rest" '')
end

function ${NAME}_asked  # what the program on that socket says it can do
    set -l path (${NAME}_arguments)
    type -q $PROG
    and command $PROG $$path[1] --timeout 1s query-commands 2>/dev/null |
        string match -ra '"name": *"[^"]*"' | string replace -r '.*"([^"]*)"' '$$1'
end

complete -c $PROG -e
complete -c $PROG -f
$LINES
""")
EMPTY = '""'
_FOUND = {
    Kind.FILE: "({name}_behind '{prefix}' __fish_complete_path)",
    Kind.DIRECTORY: "({name}_behind '{prefix}' __fish_complete_directories)",
    Kind.COMMAND: "(__fish_complete_command)",
    Kind.PROCESS: "({name}_behind '{prefix}' __fish_complete_pids)",
    Kind.CONGESTION: "(string split ' ' < /proc/sys/net/ipv4/tcp_available_congestion_control)",
    Kind.ASKED: "({name}_asked)",
}


def script(program: Program) -> str:
    """Return what fish sources when a user first completes the program."""
    name = f"__{program.page.replace('-', '_')}"
    words = [one.name.split()[-1] for one in program.subcommands]
    lines = _lines(program, name, "")
    for word, one in zip(words, program.subcommands, strict=True):
        lines.append(
            f"complete -c {program.name} -n '{name}_place \"\" 0' -a {word} "
            f"-d {quote(short(one.description))}"
        )
        lines += _lines(one, name, word)
    every = [option for one in (program, *program.subcommands) for option in one.options]
    return SCRIPT.substitute(
        NAME=name,
        PROG=program.name,
        SUBCOMMANDS=" ".join(words) or "''",
        TAKES=" ".join(dict.fromkeys(n for option in every if option.takes for n in option.names)),
        LINES="\n".join(lines),
    )


def quote(text: str) -> str:
    """Return `text` as one word of fish, in which only \\ and ' are special."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def short(text: str) -> str:
    """Return the first clause of a help text, for a list with one line per option."""
    for end in (" (", ": ", "; "):
        text = text.partition(end)[0]
    return text.rstrip(".")


def _lines(program: Program, name: str, command: str) -> list[str]:
    prog = program.name.split()[0]
    lines = [
        f"complete -c {prog} -n '{name}_in {command or EMPTY}' "
        f"{_names(option)}{_taken(option, name)} -d {quote(short(option.help))}"
        for option in program.options
    ]
    shift = 1 if command else 0
    lines += [
        f"complete -c {prog} -n '{name}_place {command or EMPTY} {place + shift}' "
        f"-a {_answer(one.values, name)} -d {quote(short(one.help))}"
        for place, one in enumerate(program.arguments)
        if one.values
    ]
    return lines


def _names(option: Option) -> str:
    return " ".join(
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
    )


def _taken(option: Option, name: str) -> str:
    if not option.takes:
        return ""
    return f" -x -a {_answer(option.values, name)}" if option.values else " -x"


def _answer(taken: Values, name: str) -> str:
    """Return one word that fish evaluates each time it completes the value."""
    parts = list(taken.words)
    parts += [_FOUND[kind].format(name=name, prefix=prefix) for prefix, kind in taken.found]
    return quote(" ".join(parts))

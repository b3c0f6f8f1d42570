"""The completion for bash. Of the package bash-completion it needs only that it is found.

readline splits words at = and : (COMP_WORDBREAKS), which our values often contain. So the script
joins the words again, from COMP_LINE, and returns of each answer only what follows the last such
character.
"""

from __future__ import annotations

import shlex
from string import Template

from migrate.manual.parsers import Kind, Option, Program, Values

# NAME is the function that bash calls; the names of all others begin with it.
SCRIPT = Template(r"""# bash completion for $PROG, made from its parser

${NAME}_split() {  # words, as they were typed up to the cursor
    local rest=$${COMP_LINE:0:COMP_POINT} blank=1 piece i
    words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        piece=$${rest#"$${rest%%[![:space:]]*}"}
        [[ $$piece == "$$rest" && i -gt 0 ]] || blank=1
        rest=$${piece#"$${COMP_WORDS[i]}"}
        [[ $$rest != "$$piece" ]] && piece=$${COMP_WORDS[i]}
        if ((i == COMP_CWORD)); then rest=; fi
        if ((blank)); then words+=("$$piece"); else words[$${#words[@]} - 1]+=$$piece; fi
        blank=0
    done
}

${NAME}_found() {  # PREFIX compgen's options: what it finds behind the prefix
    local prefix=$$1 one
    shift
    if [[ $$value == "$$prefix"* ]]; then
        [[ $$1 == -[df] ]] && compopt -o filenames 2>/dev/null  # as names are quoted
        while IFS= read -r one; do
            found+=("$$prefix$$one")
        done < <(compgen "$$@" -- "$${value#"$$prefix"}")
    elif [[ $$prefix == "$$value"* ]]; then
        found+=("$$prefix")
    fi
}

${NAME}_words() {  # WORD...: those that begin as the value does
    local one
    for one; do
        [[ $$one == "$$value"* ]] && found+=("$$one")
    done
}

${NAME}_asked() {  # what the program on that socket says it can do
    $PROG "$${arguments[0]}" --timeout 1s query-commands 2>/dev/null |
        grep -o '"name": *"[^"]*"' | cut -d'"' -f4
}

${NAME}_value() {  # OPTION or the number of an argument, in $$command
    case "$$command:$$1" in
$VALUES
    esac
}

${NAME}_takes() {  # OPTION: whether a value follows it
    case "$$command:$$1" in
$TAKES) return 0 ;;
    esac
    return 1
}

$NAME() {
    local words=() arguments=() found=() command= option= value only= one cut i
    ${NAME}_split
    for ((i = 1; i < $${#words[@]} - 1; i++)); do
        one=$${words[i]}
        if [[ $$option ]]; then option=
        elif [[ $$only || $$one != -?* ]]; then
            case $$i:$$one in
$SUBCOMMANDS
            *) arguments+=("$$one") ;;
            esac
        elif [[ $$one == -- ]]; then only=1
        elif ${NAME}_takes "$$one"; then option=$$one
        fi
    done
    value=$${words[i]}
    if [[ $$option ]]; then ${NAME}_value "$$option"
    elif [[ ! $$only && $$value == --*=* ]]; then
        one=$${value%%=*} value=$${value#*=}
        ${NAME}_value "$$one"
        found=("$${found[@]/#/$$one=}") value=$$one=$$value
    else
        [[ $$only || $$value == -* ]] || ${NAME}_value "$${#arguments[@]}"
        ((i == 1)) && ${NAME}_words $FIRST
        if [[ ! $$only && ($$value == -* || $${#found[@]} -eq 0) ]]; then
            case $$command in
$OPTIONS
            esac
        fi
    fi
    cut=$${value%"$${value##*[=:]}"}
    [[ $$COMP_WORDBREAKS == *:* || $$cut != *: ]] || cut=$${value%"$${value##*=}"}
    COMPREPLY=("$${found[@]#"$$cut"}")
    [[ $${#found[@]} -eq 1 && $${found[0]} == *[=:] ]] && compopt -o nospace 2>/dev/null
    return 0
}

complete -F $NAME $PROG
""")
_COMPGEN = {
    Kind.FILE: "-f",
    Kind.DIRECTORY: "-d",
    Kind.COMMAND: "-c",
    Kind.PROCESS: '-W "$(cd /proc && printf "%s " [0-9]*)"',
    Kind.CONGESTION: '-W "$(cat /proc/sys/net/ipv4/tcp_available_congestion_control 2>/dev/null)"',
    Kind.ASKED: '-W "$({name}_asked)"',
}


def script(program: Program) -> str:
    """Return what bash sources when a user first completes the program."""
    name = f"_{program.page.replace('-', '_')}"
    branches = {"": program} | {_word(one): one for one in program.subcommands}
    return SCRIPT.substitute(
        NAME=name,
        PROG=program.name,
        VALUES="\n".join(
            f"    {_pattern(command, keys)}) {_answer(taken, name)} ;;"
            for command, one in branches.items()
            for keys, taken in _values(one)
        ),
        TAKES=" | \\\n".join(
            f"    {_pattern(command, option.names)}"
            for command, one in branches.items()
            for option in one.options
            if option.takes
        ),
        SUBCOMMANDS="\n".join(
            f"            1:{word}) command={word} ;;" for word in branches if word
        ),
        FIRST=" ".join(word for word in branches if word),
        OPTIONS="\n".join(
            f"            {shlex.quote(command)}) {name}_words {_names(one.options)} ;;"
            for command, one in branches.items()
        ),
    )


def _word(subcommand: Program) -> str:
    return subcommand.name.split()[-1]


def _names(options: tuple[Option, ...]) -> str:
    return " ".join(name for option in options for name in option.names)


def _pattern(command: str, keys: tuple[str, ...]) -> str:
    return " | ".join(f"{command}:{key}" for key in keys)


def _values(program: Program) -> list[tuple[tuple[str, ...], Values]]:
    """Return the values of each option, and of each argument by its number."""
    taken = [(option.names, option.values) for option in program.options]
    taken += [((str(place),), one.values) for place, one in enumerate(program.arguments)]
    return [(keys, one) for keys, one in taken if one]


def _answer(taken: Values, name: str) -> str:
    lines = []
    if taken.words:
        lines.append(f"{name}_words {shlex.join(taken.words)}")
    lines += [
        f"{name}_found {shlex.quote(prefix)} {_COMPGEN[kind].replace('{name}', name)}"
        for prefix, kind in taken.found
    ]
    return "; ".join(lines)

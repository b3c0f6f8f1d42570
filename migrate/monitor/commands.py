"""The commands of the machine protocol, by name. Their arguments are checked in QEMU's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from migrate.monitor import settings
from migrate.monitor.human import HumanMonitor
from migrate.monitor.monitored import CommandError, MonitoredProgram

Arguments = dict[str, Any]
Command = Callable[[Arguments], Any]


def commands(program: MonitoredProgram) -> dict[str, Command]:
    """Return the commands that `program` answers.

    Each takes its arguments and returns what the JSON answer is made of, None for {}; it raises
    CommandError to refuse them.
    """
    human = HumanMonitor(program)
    plain: dict[str, Callable[[], Any]] = {
        "query-migrate": program.query_migrate,
        "query-status": program.query_status,
        "query-migrate-parameters": lambda: {
            name: value for name, (value, _) in program.table().items()
        },
        "query-migrate-capabilities": lambda: [
            {"capability": name, "state": on}
            for name, on in settings.switches(program.parameters).items()
        ],
        "query-migrate-cache-size": lambda: program.parameters.cache_size,
        "migrate_cancel": program.cancel,
        "quit": program.quit,
    }

    def human_command(given: Arguments) -> str:
        line = _text(given, "command-line")
        _only(given, "command-line", "cpu-index")
        return human.execute(line).replace("\n", "\r\n")

    def set_cache_size(given: Arguments) -> None:
        _only(given, "value")
        program.set_parameters({"xbzrle-cache-size": _given(given, "value")})

    return {
        **{name: _plain(what) for name, what in plain.items()},
        "human-monitor-command": human_command,
        "migrate": lambda given: _migrate(program, given),
        "migrate-incoming": lambda given: _migrate_incoming(program, given),
        "migrate-set-cache-size": set_cache_size,
        "migrate-set-capabilities": lambda given: _set_capabilities(program, given),
        "migrate-set-parameters": program.set_parameters,
    }


def _plain(what: Callable[[], Any]) -> Command:
    def command(given: Arguments) -> Any:
        _only(given)
        return what()

    return command


def _migrate(program: MonitoredProgram, given: Arguments) -> None:
    if given.get("resume"):
        raise CommandError("a migration whose connection breaks resumes by itself")
    if given.get("blk") or given.get("inc"):
        raise CommandError("there are no block devices: memory alone is moved")
    program.migrate(_uri(given, "detach", "resume", "blk", "inc"))


def _migrate_incoming(program: MonitoredProgram, given: Arguments) -> None:
    if given.get("exit-on-error") is False:
        raise CommandError(
            "exit-on-error cannot be off: a destination exits if the migration fails"
        )
    program.migrate_incoming(_uri(given, "exit-on-error"))


def _set_capabilities(program: MonitoredProgram, given: Arguments) -> None:
    _only(given, "capabilities")
    items = _given(given, "capabilities")
    if not isinstance(items, list) or not all(isinstance(one, dict) for one in items):
        raise CommandError("Parameter 'capabilities' expects an array of objects")
    for one in items:
        _only(one, "capability", "state")
    program.set_capabilities([(_given(one, "capability"), _given(one, "state")) for one in items])


def _uri(given: Arguments, *others: str) -> str:
    """Return the address in `uri` or `channels`, in the form that --listen and migrate-src take.

    others -- the names of further arguments that the command has
    """
    _only(given, "uri", "channels", *others)
    if "channels" not in given:
        return _text(given, "uri")
    if "uri" in given:
        raise CommandError(
            "'uri' and 'channels' arguments are mutually exclusive; exactly one of the two "
            "should be present in 'migrate' qmp command "
        )
    channels = given["channels"]
    address = None
    if isinstance(channels, list) and len(channels) == 1 and isinstance(channels[0], dict):
        address = channels[0].get("addr")
    if not isinstance(address, dict) or channels[0].get("channel-type") != "main":
        raise CommandError("Parameter 'channels' expects one channel of type main, with an addr")
    host, port, path = (address.get(name) for name in ("host", "port", "path"))
    known = (address.get("transport"), address.get("type"))
    if known == ("socket", "inet") and isinstance(host, str) and isinstance(port, str):
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
    if known == ("socket", "unix") and isinstance(path, str):
        return f"unix:{path}"
    raise CommandError("Parameter 'addr' expects a socket of type inet (host, port) or unix (path)")


def _only(given: Arguments, *known: str) -> None:
    for name in given:
        if name not in known:
            raise CommandError(f"Parameter '{name}' is unexpected")


def _given(given: Arguments, name: str) -> Any:
    if name not in given:
        raise CommandError(f"Parameter '{name}' is missing")
    return given[name]


def _text(given: Arguments, name: str) -> str:
    value = _given(given, name)
    if not isinstance(value, str):
        raise CommandError(f"Invalid parameter type for '{name}', expected: string")
    return value

"""The human monitor: a line in, text out, with QEMU's commands, those of early versions too.

(migrate-src) migrate_set_cache_size 256m
(migrate-src) migrate -d tcp:host:4444
(migrate-src) info migrate
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from migrate.errors import UsageError
from migrate.monitor import settings
from migrate.monitor.monitored import TRY_HELP, CommandError, MonitoredProgram
from migrate.monitor.words import words_of
from migrate.output import printable
from migrate.units import parse_milliseconds


class _Command(NamedTuple):
    """One command.

    run         -- takes the words after the name, and returns the answer
    arguments   -- what help calls these words
    least, most -- how many of them there may be
    """

    run: Callable[[list[str]], str]
    arguments: str
    help: str
    least: int = 0
    most: int = 0


class HumanMonitor:
    """Executes lines for one program. An answer ends with a line end, or is empty."""

    def __init__(self, program: MonitoredProgram) -> None:
        self._program = program
        self.infos = {
            "migrate": (
                "[-a]",
                "progress of the migration (-a: in the layout of later QEMUs)",
                self._info_migrate,
            ),
            "migrate_cache_size": ("", "size of the xbzrle cache", self._info_cache_size),
            "migrate_capabilities": ("", "capabilities, on or off", self._info_capabilities),
            "migrate_parameters": ("", "values of the parameters", self._info_parameters),
            "status": ("", "whether the guest runs here", self._info_status),
        }
        self.commands = {
            "help": _Command(self._help, "[command]", "list the commands, or one of them", 0, 1),
            "info": _Command(self._info, "what", f"show one of {', '.join(self.infos)}", 0, 2),
            "quit": _Command(self._quit, "", "end the program"),
            "migrate_cancel": _Command(self._cancel, "", "cancel the migration"),
            "migrate_set_cache_size": _Command(
                self._set_cache_size, "value", "set the xbzrle cache size (default unit: MiB)",
                1, 1,
            ),
            "migrate_set_capability": _Command(
                self._set_capability, "capability on|off", "switch a capability", 2, 2
            ),
            "migrate_set_parameter": _Command(
                self._set_parameter, "parameter value",
                "set a parameter, also while a migration runs", 2, 2,
            ),
        }  # fmt: skip
        if program.receives:
            self.commands["migrate_incoming"] = _Command(
                self._incoming, "uri", "listen at uri for a guest", 1, 1
            )
        else:
            self.commands["migrate"] = _Command(
                self._migrate, "[-d] uri", "move the guest to uri (-d: do not wait)", 1, 2
            )
            self.commands["migrate_set_speed"] = _Command(
                self._set_speed, "value", "set max-bandwidth (default unit: MiB/s)", 1, 1
            )
            self.commands["migrate_set_downtime"] = _Command(
                self._set_downtime, "value", "set downtime-limit (default unit: seconds)", 1, 1
            )

    @property
    def prompt(self) -> str:
        return f"({self._program.name}) "

    async def run(self, line: str) -> str:
        """Execute a line; return its answer.

        Waits for the end of the migration after `migrate` without -d, and until the destination
        listens after `migrate_incoming`.
        """
        try:
            words = words_of(line)
        except UsageError:
            words = []
        said = self.execute(line)
        waits = words[:1] in (["migrate"], ["migrate_incoming"]) and "-d" not in words
        if not said and waits:
            why = await self._program.ended()
            said = f"Error: {why}\n" if why else ""
        return said

    def execute(self, line: str) -> str:
        """Execute a line; return its answer. `migrate` does not wait for the migration."""
        try:
            name, *words = words_of(line) or [""]
        except UsageError as error:
            return f"Error: {printable(str(error))}\n"
        name = {"?": "help", "q": "quit"}.get(name, name)
        if not name:
            return ""
        command = self.commands.get(name)
        if command is None:
            return f"unknown command: '{printable(name)}'\n"
        if not command.least <= len(words) <= command.most:
            wrong = "extraneous characters at the end of line"
            if len(words) < command.least:
                wrong = f"missing arguments: {command.arguments}"
            return f'{name}: {wrong}\nTry "help {name}"{TRY_HELP}'
        try:
            return command.run(words)
        except (CommandError, UsageError) as error:
            return f"Error: {printable(str(error))}\n"

    # -- commands that show

    def _help(self, words: list[str]) -> str:
        known = {words[0]: self.commands.get(words[0])} if words else dict(self.commands)
        lines = [
            f"{' '.join(filter(None, (name, one.arguments)))} -- {one.help}\n"
            for name, one in sorted(known.items())
            if one is not None
        ]
        return "".join(lines) or f"unknown command: '{printable(words[0])}'\n"

    def _info(self, words: list[str]) -> str:
        if not words:
            return "".join(
                f"{' '.join(filter(None, ('info', name, arguments)))} -- {what}\n"
                for name, (arguments, what, _) in self.infos.items()
            )
        found = self.infos.get(words[0])
        if found is None:
            return f"unknown command: 'info {printable(words[0])}'\n"
        if words[1:] not in ([], ["-a"]) or (words[1:] and words[0] != "migrate"):
            wrong = "extraneous characters at the end of line"
            return f'info {words[0]}: {wrong}\nTry "info"{TRY_HELP}'
        if words[1:]:
            return f"{self._program.info_migrate(whole=True)}\n"
        return found[2]()

    def _info_migrate(self) -> str:
        return f"{self._program.info_migrate()}\n"

    def _info_cache_size(self) -> str:
        return f"xbzrle cache size: {self._program.parameters.cache_size >> 10} kbytes\n"

    def _info_capabilities(self) -> str:
        """Return them on one line, as the first QEMU with xbzrle did."""
        on = settings.switches(self._program.parameters)
        return " , ".join(f"{name}: {'on' if on[name] else 'off'}" for name in on) + "\n"

    def _info_parameters(self) -> str:
        return "".join(f"{name}: {shown}\n" for name, (_, shown) in self._program.table().items())

    def _info_status(self) -> str:
        status = self._program.query_status()
        if status["running"]:
            return "VM status: running\n"
        return f"VM status: paused ({status['status']})\n"

    # -- commands that act

    def _set(self, name: str, value: int | bool | str) -> str:
        self._program.set_parameters({name: value})
        return ""

    def _set_parameter(self, words: list[str]) -> str:
        return self._set(words[0], settings.parse(*words))

    def _set_cache_size(self, words: list[str]) -> str:
        return self._set("xbzrle-cache-size", settings.mebibytes(words[0], "cache size"))

    def _set_speed(self, words: list[str]) -> str:
        return self._set("max-bandwidth", settings.mebibytes(words[0], "speed"))

    def _set_downtime(self, words: list[str]) -> str:
        value = parse_milliseconds(words[0], "downtime", bare="s")
        return self._set("downtime-limit", round(value))

    def _set_capability(self, words: list[str]) -> str:
        if words[1] not in ("on", "off"):
            raise UsageError("Parameter 'state' expects 'on' or 'off'")
        self._program.set_capabilities([(words[0], words[1] == "on")])
        return ""

    def _migrate(self, words: list[str]) -> str:
        flags = [word for word in words if word.startswith("-")]
        where = [word for word in words if not word.startswith("-")]
        if len(where) != 1 or set(flags) - {"-d"}:
            raise UsageError("write migrate [-d] tcp:HOST:PORT, or unix:PATH")
        self._program.migrate(where[0])
        return ""

    def _incoming(self, words: list[str]) -> str:
        self._program.migrate_incoming(words[0])
        return ""

    def _cancel(self, _words: list[str]) -> str:
        self._program.cancel()
        return ""

    def _quit(self, _words: list[str]) -> str:
        self._program.quit()
        return ""

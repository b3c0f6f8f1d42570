"""Draws the report's pictures in a process of their own, isolated (see migrate.guests.isolated).

matplotlib reads ./matplotlibrc of the working directory, settings and fonts below HOME, and writes
caches there. Others may have put files and links there, and a FIFO would never end. So the helper
works in / and has an empty home, which is removed afterwards.

    report.py --pickle: History, limit--> stdin | main | stdout --JSON: [title, SVG]...--> report.py
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from importlib.util import find_spec

from migrate.directory import identity_of, leads_to
from migrate.errors import MigrationError
from migrate.guests import isolated
from migrate.views.history import History

# The first start of matplotlib looks at all fonts there are.
SECONDS = 120.0
# Variables that name places to read settings and fonts from.
PLACES = ("MPL", "MATPLOTLIB", "XDG_", "FONTCONFIG_", "FC_", "TMP", "TEMP", "HOME")


def figures(history: History, limit: float | None) -> list[tuple[str, str]]:
    """Return title and SVG of each picture; see plots.figures. Raises MigrationError, OSError."""
    where = tempfile.gettempdir()
    if not leads_to(os.path.abspath(where), identity_of(os.stat(where))):
        raise MigrationError(f"others can replace what is in {where}: set TMPDIR to another place")
    with tempfile.TemporaryDirectory(prefix="xbmigrate-", dir=where) as home:
        try:
            done = subprocess.run(
                isolated.command("migrate.views.drawing", _packages()),
                input=pickle.dumps((history, limit)), capture_output=True, check=False,
                cwd="/", env=_environment(home), timeout=SECONDS, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MigrationError(f"matplotlib has not drawn it in {SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise MigrationError(f"matplotlib cannot draw it: {said}")
    return [(title, svg) for title, svg in json.loads(done.stdout)]


def _packages() -> str:
    """The directory that has matplotlib: it need not be the one that has us."""
    found = find_spec("matplotlib")
    return os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""


def _environment(home: str) -> dict[str, str]:
    kept = {
        name: value for name, value in isolated.environment().items() if not name.startswith(PLACES)
    }
    return kept | {"HOME": home, "MPLCONFIGDIR": home, "TMPDIR": home}


def main() -> None:
    packages = sys.argv[1]
    if packages not in sys.path:
        sys.path.append(packages)
    from migrate.views import plots

    history, limit = pickle.load(sys.stdin.buffer)
    sys.stdout.write(json.dumps(plots.figures(history, limit)))


if __name__ == "__main__":
    main()

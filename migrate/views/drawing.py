"""Draw the report's figures in an isolated helper process (see runtime.helper_process).

matplotlib reads ./matplotlibrc, and settings and fonts below HOME, and writes caches there. Other
users may have put files, links or FIFOs there. So the helper works in / and has an empty home,
which is removed afterwards.

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

from migrate.errors import MigrationError, UsageError
from migrate.files.identity import identity_of
from migrate.files.trusted_places import leads_to
from migrate.runtime import helper_process
from migrate.views.history import History

# Generous: when matplotlib starts for the first time, it looks at all installed fonts.
SECONDS = 120.0
# Prefixes of variables that name places to read settings and fonts from.
PLACES = ("MPL", "MATPLOTLIB", "XDG_", "FONTCONFIG_", "FC_", "TMP", "TEMP", "HOME")

# Packages that matplotlib needs. Each may be installed in a directory of its own.
PARTS = (
    "matplotlib", "numpy", "PIL", "contourpy", "cycler", "dateutil", "fontTools", "kiwisolver",
    "packaging", "pyparsing", "six",
)  # fmt: skip


def check() -> None:
    """Raise UsageError if it is clear already that nothing can be drawn."""
    if find_spec("matplotlib") is None or find_spec("numpy") is None:
        raise UsageError("--report draws with matplotlib: pip install 'xbmigrate[report]'")
    try:
        _place()
        helper_process.command("migrate.views.drawing")
    except (MigrationError, OSError) as error:
        raise UsageError(f"--report: {getattr(error, 'strerror', None) or error}") from None


def figures(history: History, limit: float | None) -> list[tuple[str, str]]:
    """Return title and SVG of each figure; see plots.figures. Raises MigrationError, OSError."""
    with tempfile.TemporaryDirectory(prefix="xbmigrate-", dir=_place()) as home:
        try:
            done = subprocess.run(
                helper_process.command("migrate.views.drawing", *_packages()),
                input=pickle.dumps((history, limit)), capture_output=True, check=False,
                cwd="/", env=_environment(home), timeout=SECONDS, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MigrationError(f"matplotlib took longer than {SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise MigrationError(f"matplotlib cannot draw it: {said}")
    return [(title, svg) for title, svg in json.loads(done.stdout)]


def _place() -> str:
    """Return a directory for the helper's home. Raises MigrationError, OSError."""
    where = tempfile.gettempdir()
    if not leads_to(os.path.abspath(where), identity_of(os.stat(where))):
        raise MigrationError(f"others can replace what is in {where}: set TMPDIR to another place")
    return where


def _packages() -> list[str]:
    """Return the directories of matplotlib and its parts, which may differ from ours."""
    found = filter(None, map(find_spec, PARTS))
    paths = (os.path.abspath(one.origin) for one in found if one.origin)
    # A package's origin is its __init__.py; six is a single file.
    whole = (os.path.dirname(path) if "__init__" in path else path for path in paths)
    return list(dict.fromkeys(map(os.path.dirname, whole)))


def _environment(home: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in helper_process.environment().items()
        if not name.startswith(PLACES)
    }
    return kept | {"HOME": home, "MPLCONFIGDIR": home, "TMPDIR": home}


def main() -> None:
    sys.path += [one for one in sys.argv[1:] if one not in sys.path]
    from migrate.views import plots

    history, limit = pickle.load(sys.stdin.buffer)
    sys.stdout.write(json.dumps(plots.figures(history, limit)))


if __name__ == "__main__":
    main()

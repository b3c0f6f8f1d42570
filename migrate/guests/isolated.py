"""How our own processes are started: isolated from the working directory and the environment.

`python -m` imports from the working directory first, and a file there called migrate.py or
subprocess.py would run in place of ours, as root perhaps. Isolated mode (-I) leaves out that
directory, PYTHONPATH and the user's own packages; one directory is added again, the one that this
package was loaded from, behind the standard library and before other packages. So the same code
runs in the helper as here, whether it is a checkout, an editable install or a wheel.
"""

from __future__ import annotations

import os
import sys

import migrate
from migrate.errors import MigrationError

_ROOT = os.path.dirname(os.path.abspath(migrate.__path__[0]))
_BOOT = (
    "import runpy, sys; root, *sys.argv = sys.argv[1:]; root in sys.path or sys.path.insert(next("
    "(i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)), root); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules as a program, with these arguments.

    Raises MigrationError where it is not known which Python runs us (an embedded one).
    """
    if not os.path.isabs(sys.executable or ""):
        raise MigrationError("no helper process can be started: the path of Python is not known")
    return [sys.executable, "-I", "-c", _BOOT, _ROOT, module, *arguments]


def environment() -> dict[str, str]:
    """The environment for a helper that runs no command of the user's: without PYTHON*."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

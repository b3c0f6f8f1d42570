"""The rooms: which package may import which, and no module in a circle with another.

Imports count wherever they stand: at the top, inside a function, for types only.
"""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a room may import those above its line in this list, and itself.
LAYERS = (
    {"proto.wire"},
    {"proto.codec"},
    {"proto.xbzrle", "proto.qemu"},
    {"proto.survey"},
    {"migrate.output", "migrate.statistics"},
    {"migrate.errors", "migrate.events"},
    {"migrate.units", "migrate.runtime"},
    {"migrate.files"},
    {"migrate.memory", "migrate.policy"},
    {"migrate.tracking"},
    {"migrate.transport", "migrate.guests"},
    {"migrate.ownership"},
    {"migrate.source", "migrate.destination"},
    {"migrate.api"},
    {"migrate.inspect", "migrate.monitor", "migrate.views"},
    {"migrate.qemu"},
    {"migrate.cli"},
    {"migrate.manual"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("migrate", "proto"):
        for path in (ROOT / package).rglob("*.py*"):
            if path.suffix in (".py", ".pyx"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """Return the project's modules that a file imports."""
    if path.suffix == ".pyx":
        lines = path.read_text().splitlines()
        named = (re.match(r"\s*(?:from|import|cimport)\s+([\w.]+)", line) for line in lines)
        return {match[1] for match in named if match and match[1] in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found


GRAPH = {name: _imports(path) - {name} for name, path in MODULES.items()}


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_modules_do_not_import_in_a_circle() -> None:
    TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("room", sorted({_room(name) for name in MODULES} - {"migrate", "proto"}))
def test_packages_import_only_lower_layers(room: str) -> None:
    """The packages' own `__init__` may hand on names of any room."""
    above = {
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if _room(module) == room != _room(other)
        and "." in other
        and LEVEL[_room(other)] >= LEVEL[room]
    }
    assert not above


def test_packages_use_no_private_names_of_others() -> None:
    private = set()
    for module, path in MODULES.items():
        if path.suffix == ".py" and "_twin" not in path.name and path.name != "kernel.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                    same = node.module.rpartition(".")[0] == module.rpartition(".")[0]
                    names = [name.name for name in node.names if name.name.startswith("_")]
                    private |= {f"{module}: {node.module}.{name}" for name in names if not same}
    assert not private

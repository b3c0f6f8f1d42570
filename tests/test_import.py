"""The package called `proto` is ours, and it knows nothing of sockets, time or the rest of us."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import proto
from tests.cells import check_each

PROTO = Path(proto.__file__).parent
FORBIDDEN = {
    "asyncio", "migrate", "multiprocessing", "select", "selectors", "signal", "socket",
    "subprocess", "threading", "time", "uvloop",
}  # fmt: skip


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        cwd=PROTO.parent, timeout=60,
    )  # fmt: skip


# The first argument stands before everything else on sys.path.
IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import migrate; print('imported')"


@pytest.mark.parametrize("body", ["", "Message = object\n", "__wire_name__ = 'proto-plus'\n"])
def test_another_package_called_proto_is_named_as_the_cause(tmp_path, body):
    """proto-plus installs one; without this check the error is about some missing attribute."""
    stub = tmp_path / "proto"
    stub.mkdir()
    (stub / "__init__.py").write_text("'''Somebody else's.'''\n" + body)
    found = run(IMPORT, str(tmp_path))
    assert found.returncode != 0
    assert "imported" not in found.stdout
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the package 'proto' in ")
    assert str(stub) in last
    assert "proto-plus" in last
    assert "environment of its own" in last


def test_with_our_own_it_is_imported():
    found = run(IMPORT, str(PROTO.parent))
    assert found.stdout == "imported\n", found.stderr


def test_every_public_name_is_there():
    import migrate

    for name in migrate.__all__:
        assert getattr(migrate, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = migrate.nonsense


def test_help_needs_no_heavy_import():
    """The programs and the guest's own process start fast: they import no more than needed."""
    found = run(
        "import sys, migrate; "
        "import migrate.cli.migrate_src, migrate.cli.migrate_dst, migrate.cli.migrate_ctl; "
        "import migrate.guests.demo.process; "
        "late = {'uvloop', 'numpy', 'migrate.source.precopy', 'migrate.transport.link'}; "
        "print(*(late & set(sys.modules)))"
    )
    assert found.stdout == "\n", found.stdout + found.stderr


def imports(path: Path) -> set[str]:
    """The first part of every module a file imports, wherever the import stands."""
    if path.suffix in (".pyx", ".pxd"):
        return set(re.findall(r"^\s*(?:c?import|from)\s+(\w+)", path.read_text(), re.MULTILINE))
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by a relative name"
            assert node.module is not None
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            assert name not in ("__import__", "import_module"), f"{path.name} hides an import"
    return found


def test_proto_is_sans_io():
    def check(path):
        assert not imports(path) & FORBIDDEN

    check_each(check, [*PROTO.rglob("*.py"), *PROTO.rglob("*.pyx"), *PROTO.rglob("*.pxd")])


def test_proto_alone_brings_none_of_them_along():
    """As above, for what it imports in turn from this project."""
    found = run(
        "import sys; import proto.wire.session, proto.wire.capabilities; "
        "import proto.codec.kernel, proto.codec.pageset; "
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'migrate'))"
    )
    assert found.stdout == "\n", found.stdout + found.stderr


def test_search_for_imports_finds_them(tmp_path):
    """The check above can fail."""
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from asyncio.events import x\n    import os.path, time as t\n")
    assert imports(path) == {"asyncio", "os", "time"}

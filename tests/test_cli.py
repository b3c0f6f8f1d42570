"""Command lines: one sentence per mistake, the right exit code, never a traceback."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from migrate.cli import exit_codes, migrate_ctl, migrate_dst, migrate_src
from migrate.cli.source_options import parameters_of, source_parser
from tests.programs import Program

NOWHERE = "tcp:127.0.0.1:1"
SIGNALS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
MAIN = {
    "migrate-src": migrate_src.main,
    "migrate-dst": migrate_dst.main,
    "migrate-ctl": migrate_ctl.main,
}


@pytest.fixture
def guest_file(tmp_path):
    path = tmp_path / "guest.mem"
    path.write_bytes(b"guest" * 2000)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a program in this process: (exit code, its one sentence)."""

    def run(program: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        before = {number: signal.getsignal(number) for number, _ in SIGNALS}
        with pytest.raises(SystemExit) as ended:
            MAIN[program]()
        for number, handler in before.items():  # at its end a program ignores them
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert out == "", "results go to standard output, and there are none"
        return ended.value.code, one_sentence(program, err)

    return run


def one_sentence(program: str, err: str) -> str:
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{program}: ")
    return lines[0].removeprefix(f"{program}: ")


@pytest.mark.parametrize(
    ("arguments", "on"),
    [
        ([], False), (["--auto-converge"], True), (["--capability", "auto-converge=on"], True),
        (["--capability", "auto-converge=off"], False),
    ],
)  # fmt: skip
def test_auto_converge_is_off_by_default(arguments, on):
    args = source_parser().parse_args([*arguments, "--max-cpu-throttle", "80", NOWHERE])
    parameters = parameters_of(args)
    assert parameters.auto_converge is on
    assert parameters.throttle.max_cpu_throttle == 80
    assert parameters.throttle.cpu_throttle_initial == 20
    assert parameters.wire_capabilities == {"xbzrle", "xbzrle-merge", "zstd"}, (
        "the peer is not told"
    )


# ---------------------------------------------------------------- mistakes: exit code 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "missing destination: give tcp:HOST:PORT, or --monitor stdio"),
        (["--nonsense", NOWHERE], "unrecognized arguments: --nonsense"),
        (["--progress", "loud", NOWHERE], "invalid choice: 'loud'"),
        (["--cpu-throttle-initial", "0", NOWHERE],
         "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99"),
        (["--max-cpu-throttle", "5", NOWHERE], "in the range of cpu_throttle_initial to 99"),
        (["--cpu-throttle-increment", "ten", NOWHERE], "'ten' is not a number"),
        (["localhost:4444"], "write tcp:HOST:PORT or unix:PATH"),
        (["tcp:localhost"], "write tcp:HOST:PORT or unix:PATH"),
        (["tcp:localhost:99999"], "write tcp:HOST:PORT or unix:PATH"),
        (["--cache-size", "100m", NOWHERE], "cache size: '100m' is not a power of two"),
        (["--cache-size", "512", NOWHERE], "did you mean 512m?"),
        (["--cache-size", "1k", NOWHERE], "at least one page (4096 bytes)"),
        (["--cache-size", "much", NOWHERE], "cache size: 'much' is not a size"),
        (["--cache-max", "64m", NOWHERE], "--cache-max: it limits --cache-size auto"),
        (
            ["--cache-size", "auto", "--cache-max", "100m", NOWHERE],
            "--cache-max: '100m' is not a power of two",
        ),
        (
            ["--cache-size", "auto", "--cache-max", "1048576t", NOWHERE],
            "--cache-max: 1048576t is more than half of the",
        ),
        (["--page-size", "3k", NOWHERE], "--page-size: '3k' is none of 1k, 2k, 4k, 8k, 16k"),
        (["--max-bandwidth", "fast", NOWHERE], "--max-bandwidth: 'fast' is not a size"),
        (["--max-bandwidth", "9" * 5000, NOWHERE], "--max-bandwidth:"),
        (["--downtime-limit", "-5", NOWHERE], "--downtime-limit"),
        (["--downtime-limit", "soon", NOWHERE], "--downtime-limit: 'soon' is not a time"),
        (["--timeout", "1e400", NOWHERE], "--timeout: '1e400' is not a time"),
        (["--connect-timeout", "inf", NOWHERE], "--connect-timeout: 'inf' is not a time"),
        (["--peer-timeout", "x", NOWHERE], "--peer-timeout: 'x' is not a time"),
        (["--max-rounds", "many", NOWHERE], "--max-rounds: 'many' is not a number"),
        (["--channels", "0", NOWHERE], "0 channels: there can be 1 to 64"),
        (["--channels", "65", NOWHERE], "65 channels: there can be 1 to 64"),
        (["--channels", "-1", NOWHERE], "--channels: '-1' is not a number"),
        (["--channels", "abc", NOWHERE], "--channels: 'abc' is not a number"),
        (["--channels", "1.5", NOWHERE], "--channels: '1.5' is not a number"),
        (["--channels", "", NOWHERE], "--channels: '' is not a number"),
        (["--congestion", "hope", NOWHERE], "'hope': this system does not have it"),
        (["--capability", "rdma=on", NOWHERE], "there is no capability 'rdma': known are xbzrle"),
        (["--capability", "xbzrle", NOWHERE], "write NAME=on or NAME=off"),
        (["--capability", "xbzrle=1", NOWHERE], "write NAME=on or NAME=off"),
        (["--guest", "xen", NOWHERE], "--guest 'xen' is not understood: write demo[:...], file"),
        (["--guest", "qemu", NOWHERE], "--guest qemu: missing address: write qemu:tcp:HOST:PORT"),
        (["--guest", "demo:lots", NOWHERE], "guest demo: size: 'lots' is not a size"),
        (["--guest", "demo:1m,colour=red", NOWHERE], "'colour=red' is not understood"),
        (["--guest", "demo:1m,hot=2m", NOWHERE], "hot must be 1 byte to the whole size"),
        (["--guest", "demo:0", NOWHERE], "do not fit a guest of 0 bytes"),
        (["--guest", "demo:1m,stride=0", NOWHERE], "stride at least 1"),
        (["--guest", "demo:1m,rate=-1", NOWHERE], "is not a number of writes per second"),
        (["--guest", "demo:1m,fill=ones", NOWHERE], "fill 'ones' is neither zero nor random"),
        (["--guest", "demo:1000t", NOWHERE], "does not fit the"),
        (["--guest", "demo:pid=me", NOWHERE], "does not name a process"),
        (["--guest", "demo:pid=4194999", NOWHERE], "no demo guest in process 4194999"),
        (["--guest", "demo:pid=1", NOWHERE], "no demo guest in process 1"),
        (["--pid", "1", NOWHERE], "are for file guests"),
        (["--guest", "file", NOWHERE], "name the file: --guest file:PATH"),
        (["--guest", "file:", NOWHERE], "name the file: --guest file:PATH"),
        (["--guest", "file:/no/such/file", NOWHERE], "/no/such/file: No such file or directory"),
        (["--guest", "file:/dev/null", NOWHERE], "neither a file nor a block device"),
        (["--guest", "file:/tmp", NOWHERE], "neither a file nor a block device"),
        (["--guest", "file:{file}", "--pid", "4194999", NOWHERE], "--pid 4194999: there is no"),
        (["--guest", "file:{file}", "--pid", "self", NOWHERE], "--pid: 'self' is not a number"),
        (["--guest", "file:{file}", "--pause-cmd", "true", NOWHERE], "go together"),
        (["--guest", "file:{empty}", NOWHERE], "it is empty"),
        (["--guest", "file:/proc/self/status", NOWHERE], "it is on proc"),
        (["--guest", "file:/sys/kernel/uevent_seqnum", NOWHERE], "it is on sysfs"),
        (["--guest", "file:{file}", "--pause-cmd", "(", "--resume-cmd", ":", NOWHERE],
         "--pause-cmd '(': the shell does not understand it"),
        (["--guest", "file:{file}", "--command-timeout", "x", NOWHERE], "'x' is not a time"),
        (["--journal", "{file}", NOWHERE], "Not a directory"),
    ],
)  # fmt: skip
def test_source_usage_errors(call, guest_file, tmp_path, arguments, says):
    empty = tmp_path / "empty"
    empty.touch()
    arguments = [item.format(file=guest_file, empty=empty) for item in arguments]
    code, text = call("migrate-src", *arguments)
    assert says in text
    assert code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "missing address: give --listen 4444, or --monitor stdio"),
        (["--listen", "here"], "write [HOST:]PORT or unix:PATH"),
        (["--listen", "99999"], "write [HOST:]PORT or unix:PATH"),
        (["--listen", "0", "--cache-size", "100m"], "'100m' is not a power of two"),
        (["--listen", "0", "--capability", "rdma=on"], "there is no capability 'rdma'"),
        (["--listen", "0", "--output", "{file}"], "it exists: remove it or give --overwrite"),
        (["--listen", "0", "--output", "{file}/x"], "there is no directory {file}"),
        (["--listen", "0", "--output", "/no/where/x"], "there is no directory /no/where"),
        (["--listen", "0", "--output", "{dir}", "--overwrite"], "it is not a regular file"),
        (["--listen", "0", "--output", "{dir}/x/"], "it ends in a slash: name the file"),
        (["--listen", "0", "--output", "{dir}/" + "n" * 256], "the name has 256 bytes"),
        (["--listen", "0", "--output", "/dev/null"], "but a character device"),
        (["--listen", "0", "--output", "/proc/x"], "name a directory on another file system"),
        (["--listen", "0", "--output", "{dir}/x", "--mode", "rw"], "octal digits"),
        (["--listen", "0", "--output", "{dir}/x", "--owner", "no-one"], "there is no user"),
        (["--listen", "0", "--mode", "600"], "are for the file of a guest: give --output"),
        (["--listen", "0", "--on-complete", "if"], "the shell does not understand it"),
        (["--listen", "0", "--on-complete", "/no/such x"], "/no/such: No such file or directory"),
        (["--listen", "0", "--on-complete-timeout", "soon"], "'soon' is not a time"),
        (["--listen", "0", "--journal", "{file}"], "Not a directory"),
        (["--listen", "0", "--guest", "qemu", "--output", "/dev/null"], "a character device"),
    ],
)  # fmt: skip
def test_destination_usage_errors(call, guest_file, tmp_path, arguments, says):
    names = {"file": guest_file, "dir": tmp_path}
    code, text = call("migrate-dst", *(item.format(**names) for item in arguments))
    assert says.format(**names) in text
    assert code == 2
    assert guest_file.read_bytes() == b"guest" * 2000


def test_usage_error_from_the_shell():
    """As above, by the installed programs."""
    for name, arguments in (
        ("migrate-src", ["--cache-size", "100m", NOWHERE]),
        ("migrate-dst", ["--listen", "nowhere"]),
    ):
        program = Program(name, *arguments)
        assert program.wait() == 2
        assert program.out == ""
        one_sentence(name, program.err)


# ---------------------------------------------------------------- exit code 3


def test_connection_refused(call, guest_file):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code, text = call(
        "migrate-src", "-q", "--guest", f"file:{guest_file}", "--connect-timeout", "300ms",
        f"tcp:127.0.0.1:{port}",
    )  # fmt: skip
    assert code == 3
    assert "is migrate-dst listening there?" in text


def test_connection_refused_starts_no_demo_guest():
    """A new one would be left behind, burning a core, at each try."""
    program = Program("migrate-src", "--guest", "demo:1m", "--connect-timeout", "100ms", NOWHERE)
    assert program.wait() == 3
    assert "process" not in program.err


def test_listen_address_in_use(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = call("migrate-dst", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert code == 3
    assert "cannot listen on" in text


# ---------------------------------------------------------------- help and version


@pytest.mark.parametrize("name", MAIN)
def test_help_and_version(name, monkeypatch, capsys):
    for option, pattern in (
        ("--help", r"usage: .*exit codes:\n\n? *0 (completed|answered).*examples:\n"),
        ("--version", rf"{name} \d+\.\d+\.\d+\n"),
    ):
        monkeypatch.setattr(sys, "argv", [name, option])
        with pytest.raises(SystemExit) as ended:
            MAIN[name]()
        out, err = capsys.readouterr()
        assert ended.value.code == 0
        assert re.match(pattern, out, re.DOTALL)
        assert err == ""


def test_help_lists_every_exit_code():
    from migrate import errors

    codes = {
        kind.exit_code for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MigrationError)
    }  # fmt: skip
    for code in codes | {0, 129, 130, 143}:
        assert re.search(rf"\b{code} [a-zA-Z]", exit_codes.CODES), code


# ---------------------------------------------------------------- signals


@pytest.mark.programs
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_while_connecting(guest_file, number, code):
    program = Program(
        "migrate-src", "--guest", f"file:{guest_file}", "--connect-timeout", "60s", NOWHERE
    )
    program.read_line(r"connecting to")
    program.kill(number)
    assert program.wait(20) == code
    assert "Traceback" not in program.err
    assert "migrate-src: cancelled while connecting" in program.err
    assert program.out == ""


@pytest.mark.programs
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_while_listening(tmp_path, number, code):
    output = tmp_path / "out"
    program = Program("migrate-dst", "--listen", "127.0.0.1:0", "--output", str(output))
    program.read_line(r"listening on")
    program.kill(number)
    assert program.wait(20) == code
    assert "Traceback" not in program.err
    assert "migrate-dst: cancelled; nothing is left of the guest here" in program.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.programs
@pytest.mark.parametrize("who", ["migrate-src", "migrate-dst"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_after_the_end_keeps_the_exit_code(tmp_path, guest_file, who, number):
    """An exit code of 143 would mean that the guest is still at the source."""
    output = tmp_path / "out"
    receiver = Program("migrate-dst", "--listen", "127.0.0.1:0", "--output", str(output))
    address = receiver.read_line(r"listening on (\S+)")[1]
    source = Program("migrate-src", "--guest", f"file:{guest_file}", address)
    told = {"migrate-src": source, "migrate-dst": receiver}[who]
    assert told.process.stdout.readline()
    while told.process.poll() is None:
        told.kill(number)
        time.sleep(0.001)
    assert (source.wait(20), receiver.wait(20)) == (0, 0), told.err


@pytest.mark.programs
def test_second_signal_to_a_destination_mentions_no_guest(tmp_path, guest_file):
    command = "kill $PPID; sleep 0.3; kill $PPID; sleep 1"
    receiver = Program(
        "migrate-dst", "--listen", "127.0.0.1:0", "--output", str(tmp_path / "out"),
        "--on-complete", command,
    )  # fmt: skip
    address = receiver.read_line(r"listening on (\S+)")[1]
    assert Program("migrate-src", "--guest", f"file:{guest_file}", address).wait(20) == 0
    assert receiver.wait(20) == 10
    assert "run on here" not in receiver.err


def test_nohup_ignores_sighup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = Program("migrate-dst", "--listen", "127.0.0.1:0", "--output", f"{tmp_path}/out")
    finally:
        signal.signal(signal.SIGHUP, before)
    program.read_line(r"listening on")
    program.kill(signal.SIGHUP)
    time.sleep(0.3)
    program.kill(signal.SIGTERM)
    assert program.wait(20) == 143


ENDS = """
import atexit, os, sys
from migrate.output.run import run_program
from migrate.cli import options, program
async def done(_args):
    return 9
atexit.register(os.kill, os.getpid(), int(sys.argv[1]))
run_program("migrate-src", lambda: program.run(options.Parser(), done, []))
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_at_exit_keeps_the_exit_code(number, code):
    """A guest that is handed over would pass for one that runs on."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, str(int(number))], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 9 != code
    assert ended.stderr == ""


def test_migrate_stream_dumps_no_core() -> None:
    code = """
import ctypes
from migrate.cli import migrate_stream
migrate_stream.survey = lambda _args: print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
migrate_stream.run(["-"])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "0\n", said.stderr


@pytest.mark.parametrize("asked", ["", "0", "1"])
def test_programs_dump_no_core_unless_asked(tmp_path, asked):
    code = """
import ctypes, sys
from migrate.cli import options, program
async def done(_args):
    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
    return 0
sys.exit(program.run(options.Parser(), done, []))
"""
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "MIGRATE_COREDUMPS": asked},
    )  # fmt: skip
    assert said.stdout == ("1\n" if asked == "1" else "0\n"), said.stderr


# Prints which modules are loaded between a connection and the first word over it.
LOADED_LATE = """
import os, sys
from migrate.cli import migrate_src
from migrate.transport.link import Link

before = set()
made, send = Link.connection_made, Link.send

def connection_made(self, transport):
    before.update(sys.modules)
    made(self, transport)

def spoken(self, message):
    print(*sorted(name for name in set(sys.modules) - before if name.startswith("migrate")))
    sys.stdout.flush()
    os._exit(0)

Link.connection_made, Link.send = connection_made, spoken
migrate_src.main()
"""


@pytest.mark.programs
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_nothing_is_imported_between_connect_and_hello(guest_file, more) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        told = subprocess.run(
            [sys.executable, "-c", LOADED_LATE, "-q", "--guest", f"file:{guest_file}", *more,
             address],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (told.returncode, told.stdout.split()) == (0, []), told.stderr

"""The benchmark's own arithmetic, on which its tables rely."""

import json
import signal
import sys
import time

import pytest

from tests import network
from tests.bench import __main__ as program
from tests.bench import bulk, codec, forecast, rivals, scaling, tls
from tests.bench.guest_files import (
    random_file,
    reading_time,
    same_content,
    shelf,
    sparse_file,
    zero_file,
)
from tests.bench.processes import Measured, ProgramError, private_memory
from tests.bench.registry import PARTS
from tests.bench.report import LeftOutError, Options, Part, Table, gigabytes, seconds, size_name
from tests.bench.turns import in_turn, median
from tests.bench.workload import Attempt, Workload

MIB = 1 << 20
QUIET = Options(quick=True)


# ---------------------------------------------------------------- tables and numbers


def test_table_is_markdown_and_aligned():
    table = Table(("", "GB/s"), [("random", "1.50"), ("a|b", "-")])
    lines = table.markdown().splitlines()
    assert lines == [
        "|        | GB/s |",
        "| ------ | ---: |",
        "| random | 1.50 |",
        "| a\\|b   |    - |",
    ]


def test_table_says_its_title():
    assert Table(("",), [], "Full speed").markdown().startswith("**Full speed**\n\n|")


def test_ragged_table_is_refused():
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        Table(("", "s"), [("alone",)])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0123, "0.012"), (1.234, "1.23"), (123.4, "123")]
)
def test_seconds_have_the_digits_that_mean_something(value, text):
    assert seconds(value) == text


def test_sizes_and_speeds_are_as_people_write_them():
    assert [size_name(n) for n in (512 * MIB, 2 << 30, 4096, 3)] == [
        "512 MiB", "2 GiB", "4 KiB", "3 B"
    ]  # fmt: skip
    assert gigabytes(1.5e9) == "1.50"
    assert gigabytes(4.1e7) == "0.041"


def test_measurements_are_taken_in_turn():
    taken = []
    contenders = {name: lambda name=name: taken.append(name) or len(taken) for name in "ABC"}
    assert in_turn(contenders, 2) == {"A": [1, 4], "B": [2, 5], "C": [3, 6]}
    assert "".join(taken) == "ABCABC"


def test_median_needs_values():
    assert median(iter([3.0, 1.0, 2.0])) == 2.0
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_runs_can_be_set():
    assert Options().turns() == 3
    assert Options(quick=True).turns() == 1
    assert Options(quick=True, runs=4).turns() == 4


# ---------------------------------------------------------------- the program


def test_unknown_benchmark_part_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        program.arguments(["nonsense"])
    assert ended.value.code == 2
    assert "there is no part 'nonsense': there are codec, bulk, " in capsys.readouterr().err


def test_negative_runs_are_refused(capsys):
    with pytest.raises(SystemExit):
        program.arguments(["--runs", "-1"])
    assert "once is the least" in capsys.readouterr().err


class _Left:
    def run(self, options):
        raise LeftOutError("There is no such program here.")


class _Done:
    def run(self, options):
        return Part("done", "Done", "How.", [Table(("", "s"), [("x", "1")])], {"x": [1.0]}, ["N."])


def test_skipped_part_says_why_and_the_rest_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "PARTS", {"left": _Left(), "done": _Done()})
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert program.main(["--quick", "--output", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    out = capsys.readouterr().out
    assert "left is left out: There is no such program here." in out
    assert "## Done\n\nHow.\n\n|" in out
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(written) == {"machine", "quick", "parts"}
    assert {"cpu", "cores", "memory", "kernel", "python", "qemu", "rsync", "date", "commit"} == set(
        written["machine"]
    )
    assert written["parts"]["done"]["data"] == {"x": [1.0]}
    assert written["parts"]["done"]["tables"][0]["rows"] == [["x", "1"]]


def test_parts_are_registered():
    assert {"bulk", "scaling", "rivals"} <= set(PARTS)
    assert all(callable(part.run) for part in PARTS.values())


# ---------------------------------------------------------------- measured programs


def raises(says):
    return pytest.raises(ProgramError, match=says)


def test_measured_program_reports_its_use_of_resources():
    code = "x = bytearray(b'a') * (64 << 20); import time; time.sleep(0.15); print('out')"
    with Measured([sys.executable, "-c", code]) as running:
        ended = running.expect(20)
    assert ended.out == "out\n"
    assert ended.memory > 64 * MIB
    assert ended.cpu > 0
    assert ended.wall > 0.15


def test_failure_includes_the_output_of_the_program():
    with (
        Measured([sys.executable, "-c", "import sys; sys.exit('because')"]) as running,
        raises("status 1: because"),
    ):
        running.expect(20)


def test_wait_for_missing_output_fails():
    with Measured([sys.executable, "-c", ""]) as running, raises("does not say 'ready'"):
        running.wait_for("ready")


def test_leaving_ends_what_the_program_started():
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True); "
        "print(child.pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    with Measured([sys.executable, "-c", code]) as running:
        child = int(running.wait_for(r"(\d+)\n")[1])
        time.sleep(0.1)
        assert private_memory(child) > 0
    end = time.monotonic() + 60
    while private_memory(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert private_memory(child) == 0


# ---------------------------------------------------------------- guest files


def test_guest_files_are_what_they_say():
    with shelf(16 * MIB) as directory:
        random = random_file(directory / "random", 3 * MIB + 5)
        assert random.stat().st_size == 3 * MIB + 5
        whole = random.read_bytes()
        random_file(random, MIB)
        assert random.read_bytes() == whole[:MIB], "a cut keeps what is there"
        random_file(random, 2 * MIB)
        assert random.read_bytes()[:MIB] == whole[:MIB]
        assert 0 not in map(any, zip(*[iter(random.read_bytes())] * 4096, strict=True))
        zero, sparse = zero_file(directory / "z", MIB), sparse_file(directory / "s", MIB)
        assert (zero.stat().st_blocks * 512, sparse.stat().st_blocks) == (MIB, 0)
        assert same_content(zero, sparse)
        assert not same_content(zero, random)
        assert reading_time(zero) > 0
    assert not directory.exists()


def test_missing_space_is_reported():
    with pytest.raises(LeftOutError, match="do not fit"), shelf(1 << 60):
        pass


# ---------------------------------------------------------------- what the parts make of numbers


def attempt(completed=True, seconds=2.0, downtime=0.1, **changes):
    fields = {
        "why": "" if completed else "not converged in 40 s", "link_bytes": 5_000_000,
        "expected": 0.2, "memory": "equal", "detail": {}, **changes,
    }  # fmt: skip
    return Attempt(completed, seconds=seconds, downtime=downtime if completed else None, **fields)


def test_rivals_count_the_runs_that_completed():
    numbers = rivals.medians([attempt(seconds=1), attempt(seconds=3), attempt(False, seconds=40)])
    assert numbers["seconds"] == 2
    assert rivals.outcome(numbers, 0.3) == "completed 2 of 3 times"
    assert rivals.outcome(rivals.medians([attempt(downtime=0.4)]), 0.3) == "completed, limit missed"
    gave_up = rivals.medians([attempt(False, seconds=40)])
    assert rivals.outcome(gave_up, 0.3) == "gave up"
    assert gave_up["downtime"] is None


def test_differing_memory_of_a_rival_is_reported():
    assert rivals.medians([attempt(), attempt(memory="WRONG")])["memory"] == "differs"


def test_rivals_say_why_one_gave_up():
    assert rivals.notes({"QEMU": [attempt(False), attempt(False)]}) == [
        "QEMU: not converged in 40 s."
    ]


def test_cache_is_the_hot_set_as_a_power_of_two():
    assert Workload(hot=100 * MIB).cache == 128 * MIB
    assert Workload(hot=128 * MIB).cache == 128 * MIB


def test_bulk_migration_that_gave_up_has_no_median():
    runs = [{"completed": False, "seconds": 120.0, "bytes": 1}]
    assert bulk.medians(runs) == {}


# ---------------------------------------------------------------- two parts, tiny


@pytest.mark.programs
def test_bulk_runs():
    part = bulk.measure(4 * MIB, 8 * MIB, QUIET)
    medians = part.data["medians"]
    assert set(medians) == set(part.data["runs"])
    assert all(numbers["speed"] > 0 for numbers in medians.values())
    assert medians[bulk.RANDOM]["memory_source"] > 0
    assert "| random guest" in part.text()
    json.dumps(part.data)


@pytest.mark.programs
def test_scaling_runs():
    part = scaling.measure((MIB, 2 * MIB), QUIET)
    assert list(part.data["medians"]) == [str(MIB), str(2 * MIB)]
    assert "| 2 MiB" in part.text()


# ---------------------------------------------------------------- codec and channels


def test_codec_runs(monkeypatch):
    monkeypatch.setattr(codec, "REPEATS", 1)
    part = codec.run(Options(quick=True))
    encoding, decoding, merging, kernels = part.tables
    assert [row[0] for row in encoding.rows][-1] == "geometric mean"
    assert len(decoding.rows) == 6
    assert kernels.head[1:] == tuple(part.data["simd"])
    sizes = part.data["bytes_per_page"]
    for pattern in codec.PATTERNS:
        plain, merged = sizes[f"canonical: {pattern.name}"], sizes[f"merged: {pattern.name}"]
        assert merged <= plain or plain == 0, pattern.name
    assert sizes["canonical: 1 byte per KiB"] == 15
    assert any(row[0] == "every 2nd byte of the first half" for row in merging.rows)


@pytest.mark.programs
def test_tls_runs():
    part = tls.measure(MIB, QUIET)
    assert [row[0] for row in part.tables[0].rows] == list(part.data["runs"])
    assert len(part.data["runs"]) == 4
    assert part.tables[0].rows[0][-1] == "1.00"


@pytest.mark.programs
def test_forecast_runs(monkeypatch):
    monkeypatch.setattr(forecast, "LOADS", {"small": ("hot=1m,stride=4096", [])})
    part = forecast.run(QUIET)
    assert part.tables[0].rows[0][0] == "small"
    assert part.data["small"]["real"]["status"] == "completed"
    assert part.data["small"]["predicted"]["dry-run"] is True


def test_benchmark_case_can_be_repeated():
    case = codec.Case.make(codec.PATTERNS[1])
    old = bytes(case.old)
    assert case.encode() == 15 * codec.PAGES
    case.decode()
    assert case.old == case.new
    case.old[:] = old
    assert case.encode() == 15 * codec.PAGES


def test_each_source_port_has_a_class_of_its_own():
    lines = network.classes(10**6, 0.02, "link0").splitlines()
    assert len([line for line in lines if line.startswith("class add")]) == 256
    assert len({line.rpartition("flowid")[2] for line in lines if "flowid" in line}) == 256


def test_tables_replace_the_sections_between_the_marks(tmp_path):
    page, output = tmp_path / "performance.md", tmp_path / "out"
    output.mkdir()
    page.write_text(f"before\n{program.BEGIN}\n{program.END}\nafter\n")
    facts = program.machine.describe()
    for title in ("Old", "New"):
        part = Part("codec", title, "How.", [Table(("", "s"), [("row", "1")])], {}, ["A note."])
        other = Part("bulk", f"{title} bulk", "How.", [], {})
        program.write(output, facts, QUIET, [part, other] if title == "Old" else [part])
        program.rewrite(page, output / "bench.json")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{program.END}\nafter\n")
    assert "### New\n" in text
    assert "### Old\n" not in text
    assert "### Old bulk\n" in text, "a part that was not measured again keeps its section"
    assert "- A note." in text
    assert "| row |   1 |" in text
    page.write_text("no marks")
    with pytest.raises(ProgramError, match="has no marks"):
        program.rewrite(page, output / "bench.json")

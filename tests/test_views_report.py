"""The report page: complete, self-contained, and safe with foreign text in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser

import pytest

from migrate.errors import MigrationError, UsageError
from migrate.events import SourceEvent
from migrate.statistics import Statistics, Status
from migrate.units import format_size
from migrate.views import drawing, report_page
from migrate.views.history import History
from migrate.views.report import Report
from migrate.views.report_page import milliseconds, slowed, verdict
from tests.programs import Program, destination, end_guest, guest_pid
from tests.story import move, story

VOID = {"meta", "path", "use", "rect", "br", "link"}


class Page(HTMLParser):
    """What stands on a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def written(path, status=Status.COMPLETED, rounds=3, facts=None) -> str:
    history = History()
    view = Report(history, str(path), clock=lambda: 0.0)
    view.describe(facts or {"guest": "a <script>alert(1)</script> guest", "destination": "tcp:h:1"})
    for event, s in story(rounds, status):
        history.observe(event, s)
        view.end(s) if event == "end" else view.observe(event, s)
    assert view.close() == ""
    return path.read_text()


@pytest.mark.programs
@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
@pytest.mark.parametrize("rounds", [0, 1, 3, 300])
def test_page_of_each_outcome(tmp_path, status, rounds):
    page = Page(written(tmp_path / "r.html", status, rounds))
    assert page.tags.count("svg") == 6
    assert page.tags.count("h1") == 1
    assert "1970-01-01 00:00:00 UTC" in page.text
    numbers = [row[0] for row in page.rows if row[0].split()[0] in ("1", f"{rounds}")]
    assert len(numbers) >= min(rounds, 1)


@pytest.mark.programs
def test_page_is_self_contained(tmp_path):
    text = written(tmp_path / "r.html")
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "base", "link"} & set(page.tags)
    assert all(
        value is not None and value.startswith("#")
        for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "data")
    )
    assert not re.search(r"url\((?!#)|@import", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.mark.programs
def test_foreign_text_is_escaped(tmp_path):
    text = written(tmp_path / "r.html", "failed")
    assert "<script>" not in text
    assert "a &lt;script&gt;" in text
    assert "it was &lt;b&gt;given&lt;/b&gt; up" in text


@pytest.mark.programs
def test_downtime_limit_is_drawn(tmp_path):
    facts = {"guest": "g", "downtime limit": "300 ms"}
    assert ">allowed<" in written(tmp_path / "r.html", facts=facts)
    assert ">allowed<" not in written(tmp_path / "r.html", facts={"guest": "g"})


@pytest.mark.programs
def test_figures_share_no_ids(tmp_path):
    identifiers = re.findall(r'\bid="([^"]+)"', written(tmp_path / "r.html"))
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.programs
def test_figures_use_the_page_colours(tmp_path):
    text = written(tmp_path / "r.html")
    assert "prefers-color-scheme: dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000", "#ffffff"}
    assert "var(--blue)" in drawn


def test_round_table_is_bounded(tmp_path):
    page = Page(written(tmp_path / "r.html", rounds=500))
    assert "301 rows in the middle are left out" in page.text
    assert len(page.rows) < 260


def test_advice_on_page(tmp_path):
    history = History()
    history.observe(SourceEvent.STATUS, Statistics(status=Status.COMPLETED))
    object.__setattr__(history.last, "advice", ("use a larger <cache>",))
    text = report_page.page(history, {}, [], "now")
    assert "<h2>Advice</h2>" in text
    assert "use a larger &lt;cache&gt;" in text


def test_page_of_a_second_migration(tmp_path):
    history = History()
    view = Report(history, str(tmp_path / "r.html"))
    for status in (Status.FAILED, Status.COMPLETED):
        for event, s in story(2, status):
            history.observe(event, s)
            if event == "end":
                view.end(s)
    assert view.close() == ""
    assert "failed after" in (tmp_path / "r.html").read_text()
    assert "moved in" in (tmp_path / "r-2.html").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_drawing_does_not_block_next_migration(tmp_path, monkeypatch):
    """It takes seconds, in which the program is asked, and may begin another migration."""
    go = threading.Event()
    monkeypatch.setattr(drawing, "figures", lambda _history, _limit: go.wait(60) and [])
    history = History()
    view = Report(history, str(tmp_path / "r.html"))
    for status in (Status.FAILED, Status.COMPLETED):
        for event, s in story(2, status):
            history.observe(event, s)
            if event == "end":
                view.end(s)
    assert not list(tmp_path.iterdir())
    go.set()
    assert view.close() == ""
    assert "failed after" in (tmp_path / "r.html").read_text()
    assert "moved in" in (tmp_path / "r-2.html").read_text()


def test_verdict():
    done = Statistics(status=Status.COMPLETED, total=1 << 30, total_time=2.5, downtime=0.0123,
                      dirty_sync_count=1)  # fmt: skip
    assert verdict(done) == (
        "The guest of 1.0 GiB moved in 2.50 s and 1 round, was verified, and was paused for "
        "12.3 ms."
    )
    assert "runs on at the source" in verdict(done.with_(status=Status.CANCELLED))
    assert (
        verdict(done.with_(status=Status.FAILED))
        == "The migration failed after 2.50 s and 1 round."
    )
    assert slowed(done) == ""
    assert slowed(done.with_(cpu_throttle_highest=70)) == " The guest was slowed by up to 70 %."
    assert [milliseconds(x) for x in (None, 0.25, 12.0)] == ["-", "250 ms", "12.0 s"]


def test_missing_matplotlib_is_a_usage_error(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install 'xbmigrate\[report\]'"):
        Report(History(), str(tmp_path / "r.html"))


def test_unwritable_report_is_a_usage_error(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "r.html"):
        with pytest.raises(UsageError, match="--report"):
            Report(History(), str(path))
    program = Program("migrate-src", "--report", str(tmp_path), "tcp:127.0.0.1:1")
    assert program.wait() == 2


def test_report_replaces_plain_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="it is not a regular file"):
        Report(History(), str(tmp_path / "fifo"))


def test_failed_report_leaves_no_file(tmp_path):
    history = History()
    view = Report(history, str(tmp_path / "r.html"))
    (tmp_path / "r.html").mkdir()
    for event, s in story():
        history.observe(event, s)
        if event == "end":
            view.end(s)
    assert view.close() == "Is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A working directory and a home with files that other users want matplotlib to read."""
    cwd, home = tmp_path / "cwd", tmp_path / "home"
    for directory in (cwd, home / ".config/matplotlib", home / ".cache/matplotlib"):
        directory.mkdir(parents=True)
    os.mkfifo(cwd / "matplotlibrc")
    os.mkfifo(home / ".config/matplotlib/matplotlibrc")
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MATPLOTLIBRC", str(cwd))
    monkeypatch.setenv("MPLCONFIGDIR", str(home / ".config/matplotlib"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    return home


def test_drawing_ignores_working_directory_and_home(tmp_path, planted):
    """A FIFO there would never end, and old releases of matplotlib run what stands there."""
    before = sorted(planted.rglob("*"))
    assert Page(written(tmp_path / "r.html")).tags.count("svg") == 6
    assert sorted(planted.rglob("*")) == before


def test_drawing_times_out(tmp_path, monkeypatch):
    def hang(_module, *_arguments):
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    monkeypatch.setattr(drawing.helper_process, "command", hang)
    monkeypatch.setattr(drawing, "SECONDS", 0.2)
    with pytest.raises(MigrationError, match="matplotlib took longer than 0 s"):
        drawing.figures(History(), None)


def test_drawing_failure_is_one_sentence(monkeypatch):
    monkeypatch.setattr(drawing.helper_process, "command", lambda *_: [sys.executable, "-c", "1/0"])
    with pytest.raises(MigrationError, match="cannot draw it: ZeroDivisionError: division by zero"):
        drawing.figures(History(), None)


def test_untrusted_temporary_directory_is_not_used(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setattr(drawing.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(MigrationError, match="set TMPDIR to another place"):
        drawing.figures(History(), None)
    with pytest.raises(UsageError, match="--report: others can replace .* set TMPDIR to another"):
        Report(History(), str(tmp_path / "r.html"))
    assert list(tmp_path.iterdir()) == []


def test_impossible_drawing_is_a_usage_error(tmp_path, monkeypatch):
    for fault in (FileNotFoundError(2, "No usable temporary directory"), MigrationError("no")):

        def fail(fault=fault):
            raise fault

        monkeypatch.setattr(drawing.tempfile, "gettempdir", fail)
        with pytest.raises(UsageError, match="--report: (No usable|no)"):
            Report(History(), str(tmp_path / "r.html"))
    monkeypatch.undo()
    monkeypatch.setattr(drawing.sys, "executable", "")
    with pytest.raises(UsageError, match="--report: no helper process can be started"):
        Report(History(), str(tmp_path / "r.html"))


@pytest.mark.parametrize(
    "fault", [MigrationError("<b>why</b>"), OSError(28, "full"), MemoryError()]
)
def test_page_without_pictures(tmp_path, monkeypatch, fault):
    """The migration is over: its numbers are not to be had again."""

    def fail(_history, _limit):
        raise fault

    monkeypatch.setattr(drawing, "figures", fail)
    history, why = History(), {"MigrationError": "<b>why</b>", "OSError": "full"}
    view = Report(history, str(tmp_path / "r.html"))
    for event, s in story():
        history.observe(event, s)
        if event == "end":
            view.end(s)
    said = view.close()
    kind = type(fault).__name__
    assert said == f"the page has no figures: {why.get(kind, kind)}"
    page = Page((tmp_path / "r.html").read_text())
    assert said in page.text
    assert "svg" not in page.tags
    assert "b" not in page.tags or "<b>why" not in (tmp_path / "r.html").read_text()
    assert "moved in" in page.text


def test_matplotlib_in_several_directories(tmp_path):
    """As PYTHONPATH names them, of which an isolated helper knows nothing."""
    for home, part in (("a", "matplotlib/__init__"), ("b", "numpy/__init__"), ("c", "six")):
        (tmp_path / home / part).parent.mkdir(parents=True)
        (tmp_path / home / f"{part}.py").touch()
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from migrate.views import drawing; print(*drawing._packages(), sep='\\n')"
    )
    homes = [str(tmp_path / home) for home in "abc"]
    done = subprocess.run(
        [sys.executable, "-c", script, *homes], capture_output=True, text=True, check=True
    )
    assert set(homes) <= set(done.stdout.splitlines())
    told = subprocess.run(
        drawing.helper_process.command("migrate.views.drawing", *homes), input=b"", cwd="/",
        capture_output=True, check=False,
    )  # fmt: skip
    assert b"EOFError" in told.stderr, "it began, and there was nothing to draw"


def test_page_of_a_real_migration(tmp_path):
    path = tmp_path / "r.html"
    source, _ = move("--report", str(path), "--json", "--progress", "never")
    result = json.loads(source.out)
    page = Page(path.read_text())
    ram, cache = result["ram"], result["xbzrle-cache"]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["whole"][0] == f"{ram['normal']}"
    assert rows["delta"] == [
        f"{cache['pages']}", format_size(cache["pages"] * 4096), format_size(cache["bytes"]),
    ]  # fmt: skip
    assert rows["total"][2] == format_size(ram["transferred"])
    assert f"{ram['dirty-sync-count']} (pause)" in rows
    assert rows["1"][4:6] == ["4096", "0"] or int(rows["1"][4]) <= ram["normal"]
    assert f"{ram['dirty-sync-count']} rounds" in page.text
    assert "demo guest" in page.text


def test_page_of_a_cancelled_migration(tmp_path):
    path = tmp_path / "r.html"
    receiver, address = destination()
    source = Program(
        "migrate-src", "--guest", "demo:32m,fill=random", "--max-bandwidth", "4m", "--report",
        str(path), address,
    )  # fmt: skip
    source.read_line("round 1: ")
    source.kill(2)
    assert source.wait() == 130
    receiver.wait()
    end_guest(guest_pid(source.err))
    assert "The migration was cancelled after" in Page(path.read_text()).text

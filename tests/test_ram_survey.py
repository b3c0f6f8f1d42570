"""What the survey's kernel counts and writes, and that its twin says the same of everything."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.xbzrle import encode
from tests.kernels import BOTH, COMPILED, kernel  # noqa: F401

pytestmark = pytest.mark.exhaustive

PAGE = 1024
ZERO, RAW, DELTA = range(3)
SEED = bytes(range(16))


def table(*records: tuple[int, int, bytes]) -> tuple[bytes, bytes]:
    """(data, records) of (page, kind, body), each behind a word as in a stream."""
    data, rows = b"", b""
    for page, kind, body in records:
        data += bytes(8)
        rows += struct.pack("=QQII", page, len(data), len(body), kind)
        data += body + (b"\0" if kind == ZERO else b"")
    return data, rows


def test_pages_are_counted_by_block_kind_and_round(kernel) -> None:
    survey = kernel.RamSurvey([0, 3, 3, 5], PAGE)
    first = table((0, RAW, bytes(PAGE)), (1, ZERO, b""), (3, RAW, bytes(PAGE)))
    second = table((0, DELTA, b"\0\1x"), (1, DELTA, b""), (4, DELTA, b"\1\2yy"))
    survey.note(*first, 3, 100)
    survey.note(*second, 3, 9000)
    assert survey.blocks == [
        (1, 1, 2, 3, 1, 1, 0, 0), (0,) * 8, (0, 1, 1, 4, 2, 0, 0, 1),
    ]  # fmt: skip
    assert survey.rounds == [(108, 1, 2, 0, 0), (9008, 0, 0, 3, 7)]
    assert survey.rounds_seen == 2
    assert survey.coverage(0) == (2, 2, 2, [(2, 2)])
    assert survey.coverage(1) == (0, 0, 0, [])
    assert survey.coverage(2) == (2, 0, 1, [])
    assert survey.broken == []


@pytest.mark.parametrize(
    ("delta", "what"),
    [
        (b"\0", "ends inside a record"),
        (b"\0\2x", "past the end of the delta"),
        (b"\0\0x", "empty non-zero run"),
        (b"\0\1x\0\1x", "empty zero run"),
        (b"\xff\x07\1x\0\1", "empty zero run"),
        (b"\xff\x07\2xx", "past the end of the page"),
        (b"\xff\xff\xff\1x", "does not end"),
    ],
)
def test_each_delta_is_checked_whole(kernel, delta, what) -> None:
    survey = kernel.RamSurvey([0, 2], PAGE)
    survey.note(*table((1, DELTA, delta)), 1, 50)
    assert survey.blocks[0] == (0, 0, 1, len(delta), 0, 0, 1, 1)
    [(page, at, said)] = survey.broken
    assert (page, at) == (1, 58)
    assert what in said


def test_listed_rounds_and_broken_deltas_are_bounded(kernel) -> None:
    survey = kernel.RamSurvey([0, 1], PAGE)
    data, rows = table(*[(0, DELTA, b"\0")] * 5000)
    survey.note(data, rows, 5000, 0)
    assert (len(survey.rounds), survey.rounds_seen, len(survey.broken)) == (4096, 5000, 64)
    assert sum(one[3] for one in survey.rounds) == 5000
    assert survey.coverage(0) == (1, 1, 255, [])


def test_missing_pages_are_listed(kernel) -> None:
    survey = kernel.RamSurvey([0, 20000], PAGE)
    survey.note(*table((3, ZERO, b""), (4, ZERO, b""), (9000, ZERO, b"")), 3, 0)
    assert survey.coverage(0) == (3, 0, 1, [(0, 2), (5, 8999), (9001, 19999)])


@pytest.mark.parametrize(
    "records", [[(5, RAW, b"x")], [(1 << 63, ZERO, b"")]], ids=["page", "far page"]
)
def test_page_outside_the_guest_is_refused(kernel, records) -> None:
    with pytest.raises(ValueError, match="outside the guest"):
        kernel.RamSurvey([0, 5], PAGE).note(*table(*records), 1, 0)


def test_record_outside_the_data_is_refused(kernel, tmp_path) -> None:
    data, rows = table((0, RAW, bytes(PAGE)))
    with pytest.raises(ValueError, match="outside the data"):
        kernel.RamSurvey([0, 5], PAGE).note(data[:-1], rows, 1, 0)
    with (tmp_path / "image").open("w+b") as file:
        image = kernel.RamImage(0, 5 * PAGE, PAGE, file.fileno())
        with pytest.raises(ValueError, match="outside the data"):
            image.apply(data[:-1], rows, 1)
    with pytest.raises(ValueError, match="fewer"):
        kernel.select_records(rows, 2, 0, 0, 9)


@pytest.mark.parametrize(
    ("firsts", "size"), [([0], PAGE), ([0, 1], 0), ([0, 5, 4], PAGE), ([0, 1 << 33], PAGE)]
)
def test_impossible_guests_are_refused(kernel, firsts, size) -> None:
    with pytest.raises(ValueError, match="page|blocks"):
        kernel.RamSurvey(firsts, size)


def test_records_of_some_pages_are_found_with_their_places(kernel) -> None:
    data, rows = table((1, ZERO, b""), (2, RAW, bytes(PAGE)), (3, DELTA, b"abc"), (2, ZERO, b""))
    assert kernel.select_records(rows, 4, 0, 2, 3) == [
        (2, 9, RAW, PAGE), (3, 17 + PAGE, DELTA, 3), (2, 28 + PAGE, ZERO, 0),
    ]  # fmt: skip
    assert len(data) == 28 + PAGE + 9


@pytest.mark.parametrize("mapped", [True, False])
def test_image_is_the_final_memory_of_a_block(kernel, tmp_path, mapped) -> None:
    one, two = os.urandom(PAGE), os.urandom(PAGE)
    changed = b"new" + one[3:]
    path = tmp_path / "image"
    with path.open("w+b") as file:
        file.truncate(4 * PAGE + 100)
        memory = mmap.mmap(file.fileno(), 0) if mapped else None
        image = kernel.RamImage(10, 4 * PAGE + 100, PAGE, file.fileno(), memory)
        image.apply(
            *table(
                (9, RAW, two), (10, RAW, one), (11, ZERO, b""), (12, RAW, two), (14, RAW, two),
                (15, RAW, two),
            ), 6,
        )  # fmt: skip
        delta = encode(one, changed)
        assert delta
        image.apply(
            *table(
                (10, DELTA, delta), (12, ZERO, b""), (13, DELTA, b"\2\1x"), (13, DELTA, b"\0\1"),
                (13, DELTA, b""), (14, DELTA, b"\0\2zz"),
            ), 6,
        )  # fmt: skip
    zeros = bytes(PAGE)
    expected = changed + zeros + zeros + b"\0\0x" + zeros[3:] + b"zz" + two[2:100]
    assert path.read_bytes() == expected


def test_failed_image_write_raises_os_error(kernel, tmp_path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        image = kernel.RamImage(0, PAGE, PAGE, file.fileno())
        with pytest.raises(OSError, match="[Bb]ad file"):
            image.apply(*table((0, RAW, bytes(PAGE))), 1)


def batch(first: int, *records: bytes) -> bytes:
    return struct.pack(">IQQ", 7, first, 0) + b"".join(records)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.binary(max_size=8)), max_size=12)
)
def test_survey_twins_agree_on_records(records) -> None:
    told = []
    made = [
        (page, kind, (body * 200)[:PAGE].ljust(PAGE, b".") if kind == RAW else b"" if kind == ZERO
         else body)
        for page, kind, body in records
    ]  # fmt: skip
    for each in BOTH:
        survey = each.RamSurvey([0, 4, 10], PAGE)
        survey.note(*table(*made), len(made), 7)
        fd = os.memfd_create("image")
        os.ftruncate(fd, 6 * PAGE)
        each.RamImage(4, 6 * PAGE, PAGE, fd).apply(*table(*made), len(made))
        told.append(
            (survey.blocks, survey.rounds, survey.broken, survey.coverage(0), survey.coverage(1),
             os.pread(fd, 7 * PAGE, 0))
        )  # fmt: skip
        os.close(fd)
    assert told[0] == told[1]


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=6),
            st.tuples(st.integers(0, 66), st.integers(1, 5)).map(
                lambda t: bytes([t[0] & 63, t[1]])
            ),
            st.binary(min_size=1, max_size=5).map(
                lambda run: bytes([0x80, len(run) + 2, 0, len(run)]) + run
            ),
            st.just(b"\x40\0\1"),
        ),
        max_size=6,
    ),
    st.integers(0, 3),
    st.sampled_from([(0, 0, b""), (40, PAGE, SEED), (40, PAGE, b"")]),
)
def test_survey_twins_agree_on_batches(records, raw, guest) -> None:
    head, data = batch(1, *records), bytes(raw * PAGE)
    told = []
    for each in BOTH:
        survey = each.BatchSurvey(*guest)
        told.append([survey.read(head, data), survey.read(head, data), survey.received_pages])
    assert told[0] == told[1]


def test_batch_is_checked_as_a_receiver_would(kernel) -> None:
    survey = kernel.BatchSurvey(100, PAGE, SEED)
    good = struct.pack(">IQQ", 1, 5, 0) + b"\x00\x03" + b"\x81\x03\x00\x01x"
    assert survey.read(good, b"") == (1, 5, 3, 0, 1, 3, 1, 1, len(good), "")
    assert survey.received_pages == 4
    number, _, _, raw, *_, at, what = survey.read(batch(0, b"\x40\0\1"), os.urandom(PAGE))
    assert (number, raw, at) == (7, 1, 12)
    assert "do not match" in what or "does not match" in what
    assert survey.read(batch(100, b"\0\1"), b"")[-2:] == (4, "a page number outside the guest")
    assert "holds no record" in survey.read(b"", b"")[-1]


def test_zero_run_of_a_large_guest_takes_no_memory() -> None:
    """The pages of 4 TiB are 512 MiB of bits: one record in a file of some bytes could set them."""

    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    survey = COMPILED.BatchSurvey(1 << 32, 1024, SEED)
    before = resident()
    assert survey.read(batch(0, b"\0" + b"\x80\x80\x80\x80\x10"), b"")[2] == 1 << 32
    assert survey.received_pages == 1 << 32
    assert resident() - before < 50 << 20


def test_batches_of_an_unknown_guest_are_counted(kernel) -> None:
    survey = kernel.BatchSurvey(0, 0, b"")
    assert survey.read(batch(9, b"\x40\0\2", b"\x80\3\0\1x"), bytes(2 * PAGE))[2:] == (
        0, 2, 1, 3, 1, 0, 28, "",
    )  # fmt: skip
    assert (survey.whole, survey.received_pages) == (False, 0)

"""No dirty page is ever lost: by marks under a running writer, and by scanning."""

import os
import random
import threading
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.memory._memory import run_load, set_marks
from migrate.memory.digest import Digest
from migrate.memory.dirty import MarkTracker, Scanner, ScanTracker
from migrate.memory.memory import Memory
from proto.codec.pageset import PageSet
from tests.definition import by_definition
from tests.kernels import COMPILED, kernel  # noqa: F401

PAGE = 4096
RUN, END = 1, 3
SEED = b"a seed of one migration"


# ---------------------------------------------------------------- marks


def marks_for(pages: int) -> bytearray:
    return bytearray(-(-pages // 8) * 8)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_marks_are_the_truth_and_are_taken_once(pages, data):
    written = data.draw(st.sets(st.integers(0, pages - 1)))
    marks = marks_for(pages)
    tracker = MarkTracker(memoryview(marks), pages)
    for page in written:
        set_marks(marks, page, 1)
    assert set(tracker.take()) == written
    assert len(tracker.take()) == 0


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_pages_put_back_are_taken_again_with_later_marks(pages, data):
    some = st.sets(st.integers(0, pages - 1))
    first, second = data.draw(some), data.draw(some)
    marks = marks_for(pages)
    tracker = MarkTracker(memoryview(marks), pages)
    for page in first:
        set_marks(marks, page, 1)
    taken = tracker.take()
    for page in second:
        set_marks(marks, page, 1)
    tracker.put_back(taken)
    assert set(tracker.take()) == first | second


def test_mark_outside_the_guest_is_refused():
    with pytest.raises(ValueError, match="outside"):
        set_marks(marks_for(8), 7, 2)


def test_copy_kept_by_marks_follows_a_running_writer():
    """Copying the dirty pages after taking their marks misses no write.

    The writer is the demo guest's load at full speed, in a thread without the interpreter's lock;
    half of the takes are put back, as a source does whose round failed.
    """
    pages, stride = 256, 1024
    memory = memoryview(bytearray(pages * PAGE))
    marks = marks_for(pages)
    control = array("Q", [RUN, 0, 0, 0, 0])
    writer = threading.Thread(
        target=run_load, args=(control, marks, memory, len(memory), stride, PAGE, 0.0)
    )
    tracker = MarkTracker(memoryview(marks), pages)
    copy = bytearray(len(memory))
    chance = random.Random(5)

    def follow() -> None:
        dirty = tracker.take()
        if chance.random() < 0.5:
            tracker.put_back(dirty)
            return
        for page in dirty:
            copy[page * PAGE : (page + 1) * PAGE] = memory[page * PAGE : (page + 1) * PAGE]

    writer.start()
    try:
        for _ in range(300):
            follow()
    finally:
        control[0] = END
        writer.join()
    assert control[2] > 0, "the writer has not been through the memory once"
    for page in tracker.take():
        copy[page * PAGE : (page + 1) * PAGE] = memory[page * PAGE : (page + 1) * PAGE]
    assert copy == memory


# ---------------------------------------------------------------- scanning


class Peer:
    """A guest without marks, an encoder that moves it, and what the peer has been sent."""

    def __init__(self, kernel, memory: Memory, content: bytearray, *, cache: int, page=PAGE):
        self.page = page
        self.pages = -(-memory.size // page)
        self.hashes = kernel.PageHashes(self.pages, page, SEED)
        self.encoder = kernel.PageEncoder(
            self.hashes, kernel.PageCache(cache, page) if cache else None
        )
        self.decoder = kernel.PageDecoder(kernel.PageHashes(self.pages, page, SEED), memory.size)
        self.digest = Digest(memory, self.hashes)
        self.tracker = ScanTracker(memory, self.encoder)
        self.memory = memory
        self.content = content
        self.there = bytearray(self.pages * page)
        self.round = 0

    def send(self, dirty: PageSet) -> None:
        self.round += 1
        self.encoder.begin_round(self.round)
        page = 0
        while page < self.pages:
            while page < self.pages and not self.encoder.full:
                snapshot, numbers = self.encoder.space()
                count, page = self.memory.gather(
                    dirty.bits, page, self.pages, self.page, snapshot, numbers
                )
                self.encoder.feed(count, dirty.bits)
            if self.encoder.pending:
                head, data = self.encoder.finish_batch()
                self.decoder.check(head, len(data))
                self.decoder.apply(head, data, self.there)

    def differing(self) -> set[int]:
        whole = bytes(self.content).ljust(len(self.there), b"\0")
        return {
            n for n in range(self.pages)
            if whole[n * self.page : (n + 1) * self.page]
            != self.there[n * self.page : (n + 1) * self.page]
        }  # fmt: skip


def peer_of(kernel, size: int, *, cache: int = 0, page: int = PAGE, fill=None) -> Peer:
    content = bytearray(random.Random(3).randbytes(size) if fill is None else fill)
    peer = Peer(kernel, Memory(size, memoryview(content)), content, cache=cache, page=page)
    peer.send(PageSet.full(peer.pages))
    assert peer.differing() == set()
    return peer


@pytest.mark.parametrize("cache", [0, 16 * PAGE, 1 << 20], ids=["none", "small", "all"])
def test_scan_finds_exactly_the_changed_pages(kernel, cache):
    peer = peer_of(kernel, 100 * PAGE + 100, cache=cache)
    chance = random.Random(9)
    assert len(peer.tracker.take()) == 0
    for _ in range(6):
        for _ in range(chance.randrange(12)):
            at = chance.randrange(len(peer.content))
            peer.content[at] ^= chance.randrange(1, 256)
        changed = peer.differing()
        dirty = peer.tracker.take()
        assert set(dirty) == changed
        peer.send(dirty)
        assert peer.differing() == set()


@pytest.mark.parametrize("cache", [0, 1 << 20], ids=["hash", "cache"])
def test_reverted_change_is_not_dirty(kernel, cache):
    peer = peer_of(kernel, 20 * PAGE, cache=cache)
    peer.content[7 * PAGE + 5] ^= 1
    assert set(peer.tracker.take()) == {7}
    peer.content[7 * PAGE + 5] ^= 1
    assert set(peer.tracker.take()) == set()


@pytest.mark.parametrize("cache", [0, 1 << 20], ids=["hash", "cache"])
def test_change_reverted_after_sending_is_dirty(kernel, cache):
    """ABA: the peer has B. A tracker that remembers A from the first look would miss it."""
    peer = peer_of(kernel, 20 * PAGE, cache=cache)
    for _ in range(3):
        peer.content[7 * PAGE + 5] ^= 1
        dirty = peer.tracker.take()
        assert set(dirty) == {7}
        peer.send(dirty)
        assert peer.differing() == set()


def test_change_between_the_scan_and_the_copy_is_found_later(kernel):
    """The page is copied after the scan, with newer bytes; the next scan compares with those."""
    peer = peer_of(kernel, 20 * PAGE)
    peer.content[0] ^= 1
    dirty = peer.tracker.take()
    peer.content[1] ^= 1  # page 0 again, before it is copied
    peer.content[5 * PAGE] ^= 1  # a page that this round does not send
    peer.send(dirty)
    assert set(peer.tracker.take()) == {5}


def test_unsent_page_is_found_again(kernel):
    peer = peer_of(kernel, 20 * PAGE)
    peer.content[3 * PAGE] ^= 1
    dirty = peer.tracker.take()
    peer.tracker.put_back(dirty)
    assert set(peer.tracker.take()) == {3}


def test_scan_finds_pages_that_become_or_leave_zero(kernel):
    peer = peer_of(kernel, 4 * PAGE, fill=bytes(4 * PAGE))
    peer.content[PAGE] = 1
    assert set(peer.tracker.take()) == {1}
    peer.send(PageSet(4, [1]))
    peer.content[PAGE] = 0
    assert set(peer.tracker.take()) == {1}
    peer.send(PageSet(4, [1]))
    assert set(peer.tracker.take()) == set()


def test_file_with_holes_is_scanned_like_a_buffer(kernel, tmp_path):
    path = tmp_path / "guest"
    size = 600 * PAGE + 50
    with path.open("wb+") as file:
        file.truncate(size)
        file.seek(300 * PAGE)
        file.write(b"d" * PAGE * 20)
        file.flush()
        content = bytearray(size)
        content[300 * PAGE : 320 * PAGE] = b"d" * PAGE * 20
        peer = Peer(kernel, Memory(size, fd=file.fileno()), content, cache=0)
        peer.send(PageSet.full(peer.pages))
        assert set(peer.tracker.take()) == set()
        for at in (0, 305 * PAGE, size - 1):
            file.seek(at)
            file.write(b"!")
            content[at] = ord("!")
        file.flush()
        dirty = peer.tracker.take()
        assert set(dirty) == {0, 305, 600}
        peer.send(dirty)
        assert peer.differing() == set()
        assert peer.digest.digest() == by_definition(content, PAGE, SEED)


def test_repeated_scan_of_an_all_hole_file(kernel, tmp_path):
    """A later write makes it a file with data, which the next scan must find."""
    path = tmp_path / "guest"
    size = 600 * PAGE
    with path.open("wb+") as file:
        file.truncate(size)
        content = bytearray(size)
        peer = Peer(kernel, Memory(size, fd=file.fileno()), content, cache=0)
        peer.memory.extent(0, PAGE)
        peer.send(PageSet.full(peer.pages))
        assert set(peer.tracker.take()) == set()
        for page in (300, 0, 599):
            file.seek(page * PAGE)
            file.write(b"!")
            content[page * PAGE] = ord("!")
            file.flush()
            dirty = peer.tracker.take()
            assert set(dirty) == {page}
            peer.send(dirty)
            assert peer.differing() == set()
        assert peer.digest.digest() == by_definition(content, PAGE, SEED)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1024, 4096, 16384]),
    st.integers(1, 5 << 16),
    st.sampled_from([0, 1 << 14, 1 << 20]),
    st.data(),
)
def test_hashes_kept_while_scanning_are_of_the_content(page, size, cache, data):
    peer = peer_of(COMPILED, size, cache=cache, page=page)
    for _ in range(3):
        for at in data.draw(st.lists(st.integers(0, size - 1), max_size=6)):
            peer.content[at] ^= 0x55
        dirty = peer.tracker.take()
        # every page that is as the peer has it has its hash, from the copy that was compared
        stale = PageSet(peer.pages)
        stale.bits[:] = peer.hashes.stale
        assert set(stale) <= set(dirty)
        peer.send(dirty)
    assert peer.digest.digest() == by_definition(peer.content, page, SEED)


@pytest.mark.parametrize("cache", [0, 1 << 21], ids=["hash", "cache"])
def test_digest_ignores_transient_content(cache):
    """A writer keeps flipping bytes back and forth; each hash must be of the bytes sent."""
    peer = peer_of(COMPILED, 512 * PAGE, cache=cache)
    stop = threading.Event()

    def flicker() -> None:
        at = 0
        while not stop.is_set():
            peer.content[at] ^= 1
            peer.content[at] ^= 1
            at = (at + 7919) % len(peer.content)

    writer = threading.Thread(target=flicker)
    writer.start()
    try:
        for _ in range(40):
            peer.send(peer.tracker.take())
    finally:
        stop.set()
        writer.join()
    # all is still, as in the pause: what remains is sent, and what is settled must be right
    last = peer.tracker.take()
    assert set(last) == peer.differing()
    peer.send(last)
    whole = by_definition(peer.content, PAGE, SEED)
    assert peer.digest.digest() == whole == by_definition(peer.there, PAGE, SEED)


# ---------------------------------------------------------------- several threads


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_find_together_what_one_finds(monkeypatch, tmp_path, threads):
    """They share words of the bitmaps, and bring stale hashes up to date as they go."""
    monkeypatch.setattr("migrate.memory.dirty.PIECE_BYTES", 5 * PAGE)
    chance, size = random.Random(4), 300 * PAGE + 9
    path = tmp_path / "guest"
    with path.open("wb+") as file:
        content = bytearray(chance.randbytes(size))
        content[100 * PAGE : 140 * PAGE] = bytes(40 * PAGE)
        os.pwrite(file.fileno(), content, 0)
        peer = Peer(COMPILED, Memory(size, fd=file.fileno()), content, cache=1 << 21)
        peer.send(PageSet.full(peer.pages))
        scanner = Scanner(peer.memory, peer.encoder, threads)
        for _ in range(10):
            for _ in range(40):
                at = chance.randrange(size)
                content[at] ^= 0x55
            os.pwrite(file.fileno(), content, 0)
            dirty = PageSet(peer.pages)
            scanner.scan([(0, 100), (100, 1), (101, peer.pages - 101)], dirty)
            assert set(dirty) == peer.differing()
            peer.send(dirty)
            clean = PageSet(peer.pages)
            scanner.scan([(0, peer.pages)], clean)
            assert set(clean) == set()
            assert peer.digest.stale() == 0, "the scan has hashed what deltas had changed"
        truth = COMPILED.PageHashes(peer.pages, PAGE, SEED)
        whole = bytes(content).ljust(peer.pages * PAGE, b"\0")
        truth.hash_pages(array("Q", range(peer.pages)), peer.pages, whole)
        assert (peer.hashes.table, peer.hashes.sum) == (truth.table, truth.sum)


def test_unreadable_file_is_an_error_in_any_thread(monkeypatch):
    monkeypatch.setattr("migrate.memory.dirty.PIECE_BYTES", PAGE)
    read_end, write_end = os.pipe()
    try:
        encoder = COMPILED.PageEncoder(COMPILED.PageHashes(9, PAGE, SEED))
        for threads in (1, 3):
            scanner = Scanner(Memory(9 * PAGE, fd=read_end), encoder, threads)
            with pytest.raises(OSError, match="Illegal seek"):
                scanner.scan([(0, 9)], PageSet(9))
    finally:
        os.close(read_end)
        os.close(write_end)

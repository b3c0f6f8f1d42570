"""The kernels that compare pages, one per instruction set: all of them give the twin's bytes.

Those that this processor lacks are checked too: NEON under qemu-aarch64, AVX-512 by way of SIMDe,
which has its instructions in plain C (tests/simd_kernels.c compares each with a loop over bytes).
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.codec import _xbzrle, _xbzrle_twin
from tests.requirements import need, need_program

ROOT = Path(__file__).parent.parent
NATIVE = [name for name, can in _xbzrle.simd_kernels().items() if can]
C_FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]


@contextlib.contextmanager
def chosen(name: str) -> Iterator[None]:
    assert _xbzrle.use_simd(name) == name
    try:
        yield
    finally:
        _xbzrle.use_simd(_xbzrle.SIMD)


def with_every_kernel(old: bytes, new: bytes, merge: bool) -> set[bytes | None]:
    deltas = set()
    for name in NATIVE:
        with chosen(name):
            deltas.add(_xbzrle.encode(old, new, merge))
    return deltas


def check(old: bytes, new: bytes) -> None:
    """All kernels give the twin's deltas; a merged one is not longer, and both give `new`."""
    canonical, merged = _xbzrle_twin.encode(old, new), _xbzrle_twin.encode(old, new, True)
    assert with_every_kernel(old, new, False) == {canonical}
    assert with_every_kernel(old, new, True) == {merged}
    if canonical is not None:
        assert merged is not None
        assert len(merged) <= len(canonical)
    for delta in (canonical, merged):
        if delta is not None:
            page = bytearray(old)
            _xbzrle.decode(delta, page)
            assert page == new


def with_changes(size: int, changed, noise: random.Random) -> tuple[bytes, bytes]:
    """Two versions of a page that differ in these bytes, by one bit or by many."""
    old = noise.randbytes(size)
    new = bytearray(old)
    for i in changed:
        if 0 <= i < size:
            new[i] ^= noise.choice([1, 0x80, 0x7F, 0xFF, noise.randrange(1, 256)])
    return old, bytes(new)


def test_best_kernel_is_among_those_of_this_processor():
    assert NATIVE[0] == _xbzrle.SIMD or os.environ.get("XBMIGRATE_SIMD") == _xbzrle.SIMD
    assert NATIVE[-1] == "portable"


# ---------------------------------------------------------------- crafted pages


SIZES = [1, 2, 3, 63, 64, 65, 127, 128, 129, 255, 256, 257, 319, 1000, 1024, 4095, 4096, 4097]


@pytest.mark.parametrize("size", [*SIZES, 16383, 16384])
def test_dense_and_sparse_pages(size):
    noise = random.Random(size)
    everything = range(size)
    check(*with_changes(size, [], noise))
    check(*with_changes(size, everything, noise))
    for at in {0, 1, size // 2, size - 2, size - 1} & set(everything):
        check(*with_changes(size, [at], noise))
        check(*with_changes(size, [i for i in everything if i != at], noise))
    for share in (0.01, 0.1, 0.3, 0.5, 0.9):
        check(*with_changes(size, [i for i in everything if noise.random() < share], noise))


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_gap_at_every_offset_of_a_word(gap):
    """One gap, with as many changed bytes on either side as make a difference somewhere."""
    noise = random.Random(gap)
    for place in range(60, 196):
        for before, after in [(1, 1), (2, 70), (70, 2), (125, 1), (1, 125)]:
            left, right = range(place - before, place), range(place + gap, place + gap + after)
            check(*with_changes(300, [*left, *right], noise))


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_same_gap_all_over_a_page(gap):
    noise = random.Random(gap)
    for size in (64, 100, 128, 192, 256, 257, 1024):
        for start in range(5):
            check(*with_changes(size, range(start, size, gap + 1), noise))
            # so few that the page does not overflow
            check(*with_changes(size, range(start, size // 3, gap + 1), noise))
            check(*with_changes(size, range(size // 2 + start, size * 4 // 5, gap + 1), noise))


def test_runs_with_two_byte_lengths():
    noise = random.Random(127)
    for length in (126, 127, 128, 129, 130, 191, 192, 193):
        for start in (0, 1, 62, 63, 64, 65, 127, 128, 129):
            run = [*range(start, start + length)]
            check(*with_changes(500, run, noise))
            for hole in (1, length // 2, length - 2):
                for gap in (1, 2, 3):
                    left = [i for i in run if not start + hole <= i < start + hole + gap]
                    check(*with_changes(500, left, noise))


def test_words_near_the_density_threshold():
    noise = random.Random(21)
    for count in range(17, 25):
        for start in range(62, 67):
            third = [start + 3 * i for i in range(count)]
            check(*with_changes(400, third, noise))
            for beside in (3, 130, 196):
                check(*with_changes(400, [*third, *range(beside, beside + 40, 2)], noise))
                scattered = noise.sample(range(beside, beside + 64), count)
                check(*with_changes(400, [*third, *scattered], noise))


def test_small_pages_of_every_size():
    noise = random.Random(1)
    for size in range(1, 330):
        for step in (2, 3, 4, 40):
            check(*with_changes(size, range(noise.randrange(3), size * 3 // 4, step), noise))
        check(*with_changes(size, [size - 1], noise))


@pytest.mark.emulation
@pytest.mark.parametrize("merge", [False, True])
def test_every_page_size_up_to_the_largest(merge):
    """The kernels against each other: the twin takes too long for all of them."""
    noise = random.Random(merge)
    data = noise.randbytes(16384)
    sparse = data.translate(bytes([i if i < 230 else i ^ 1 for i in range(256)]))
    rare = data.translate(bytes([i if i < 255 else 0 for i in range(256)]))
    for size in range(1, 16385):
        start = noise.randrange(16385 - size)
        old = data[start : start + size]
        for other in (sparse, rare, data[:-1] + b"!"):
            new = other[start : start + size]
            (delta,) = with_every_kernel(old, new, merge)
            if delta is not None:
                page = bytearray(old)
                _xbzrle.decode(delta, page)
                assert page == new


# ---------------------------------------------------------------- any pages


@st.composite
def versions(draw):
    """Pages of any size; runs and gaps of lengths that matter, one after the other."""
    size = draw(st.one_of(st.sampled_from(SIZES), st.integers(1, 700), st.integers(1, 16384)))
    noise = random.Random(draw(st.integers(0, 2**32)))
    lengths = st.sampled_from(
        [1, 1, 1, 2, 2, 3, 4, 61, 62, 63, 64, 65, 66, 126, 127, 128, 129, 400]
    )
    changed: list[int] = []
    at = draw(st.integers(0, 130))
    for gap, count, times in draw(
        st.lists(st.tuples(lengths, lengths, st.sampled_from([1, 1, 3, 20, 21, 22])), max_size=25)
    ):
        for _ in range(times):
            changed += range(at, min(at + count, size))
            at += count + gap
    return with_changes(size, changed, noise)


@pytest.mark.emulation
@given(versions())
@settings(max_examples=300, deadline=None)
def test_any_page_gives_the_same_bytes(pair):
    check(*pair)


@given(
    st.integers(1, 200).flatmap(
        lambda n: st.tuples(st.binary(min_size=n, max_size=n), st.integers(0, 2**n - 1))
    )
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_of_small_pages_give_the_same_bytes(drawn):
    old, bits = drawn
    check(old, bytes(b ^ (0x80 if bits >> i & 1 else 0) for i, b in enumerate(old)))


@given(st.lists(versions().map(lambda pair: (pair[0][:64], pair[1][:64])), max_size=8))
@settings(max_examples=50, deadline=None)
def test_many_pages_give_the_same_bytes(pairs):
    pairs = [pair for pair in pairs if len(pair[0]) == 64]
    old, new = (b"".join(pair[side] for pair in pairs) for side in (0, 1))
    for merge in (False, True):
        found = set()
        for name in NATIVE:
            out, lengths = bytearray(64 * (len(pairs) + 1) + 32), array("i", [0] * len(pairs))
            with chosen(name):
                used = _xbzrle.encode_pages(old, new, 64, out, lengths, merge)
            found.add((bytes(out[:used]), tuple(lengths)))
        deltas = [_xbzrle_twin.encode(*pair, merge) for pair in pairs]
        expected = b"".join(delta or b"" for delta in deltas)
        assert found == {(expected, tuple(-1 if d is None else len(d) for d in deltas))}


# ---------------------------------------------------------------- nothing outside a page is touched

# Buffers that end, or begin, where memory is that may not be touched.
GUARDED = """
import ctypes, mmap, random, sys
from array import array

from proto.codec import _xbzrle
from proto.codec.kernel import PageEncoder, PageHashes
from proto.wire.errors import DecodeError

PAGE = mmap.PAGESIZE
ROOM = 3 * 16384
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Area:
    def __init__(self):
        self.whole = mmap.mmap(-1, ROOM + 2 * 16384)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.whole))
        for guard in (at, at + 16384 + ROOM):
            assert libc.mprotect(guard, 16384, 0) == 0, ctypes.get_errno()
        self.view = memoryview(self.whole)[16384 : 16384 + ROOM]

    def put(self, content, at_end):
        where = slice(ROOM - len(content), ROOM) if at_end else slice(0, len(content))
        self.view[where] = content
        return self.view[where]

olds, news, deltas, outs, pages = (Area() for _ in range(5))
"""

COMPARE = """
noise = random.Random(7)
sizes = [*range(1, 400), *noise.sample(range(400, 16385), 300), *range(1023, 16385, 1024)]
sizes += range(1024, 16385, 1024)
for size in sizes:
    for kind in range(4):
        old = noise.randbytes(size)
        new = bytearray(old)
        changed = {0: [size - 1], 1: range(0, size, 3), 2: range(max(size - 40, 0), size, 2)}
        for i in changed.get(kind, noise.sample(range(size), min(size, 9))):
            new[i] ^= 0x80
        for at_end in (True, False):
            for merge in (False, True):
                expected = _xbzrle.encode(old, new, merge)
                a, b = olds.put(old, at_end), news.put(new, at_end)
                delta = _xbzrle.encode(a, b, merge)
                assert delta == expected
                out = outs.put(bytes(2 * size + 32), at_end)
                lengths = array("i", [0])
                used = _xbzrle.encode_pages(a, b, size, out, lengths, merge)
                assert out[:used] == (delta or b"")
                page = pages.put(old, at_end)
                _xbzrle.decode(deltas.put(delta or b"", at_end), page)
                assert page == (old if delta is None else new)
                for cut in range(min(len(delta or b""), 4)):
                    try:
                        _xbzrle.decode(deltas.put(delta[: len(delta) - cut], at_end), page)
                    except DecodeError:
                        pass
print("alive", _xbzrle.SIMD)
"""

HASH = """
noise = random.Random(8)
for size in (1024, 2048, 4096, 8192, 16384):
    hashes, same = (PageHashes(2, size, b"seed") for _ in range(2))
    for at_end in (True, False):
        content = noise.randbytes(size)
        hashes.hash_pages(array("Q", [1]), 1, olds.put(content, at_end))
        same.hash_pages(array("Q", [1]), 1, content)
        assert hashes.table == same.table
        encoder = PageEncoder(hashes)
        for first in (0, 1):
            for page in (content, bytes(size), bytes(size - 1) + b"x"):
                bits = bytearray(8)
                assert encoder.scan(first, 1, news.put(page, at_end), bits) == 1
print("alive", _xbzrle.SIMD)
"""

OVER_READ = """
olds.put(b"x", True)
print(ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(olds.whole)) + 16384 + ROOM, 1))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARDED + code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


@pytest.mark.emulation
@pytest.mark.parametrize("code", [COMPARE, HASH], ids=["codec", "hash"])
@pytest.mark.parametrize("name", NATIVE)
def test_no_kernel_touches_a_byte_outside_its_buffers(name, code):
    done = run(code, XBMIGRATE_SIMD=name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"alive {name}\n", "")


def test_guard_pages_detect_one_byte_too_many():
    """The check above can fail."""
    assert run(OVER_READ).returncode == -signal.SIGSEGV


# ---------------------------------------------------------------- kernels of other processors


def compiled(path: Path, compiler: str, *flags: str) -> str:
    program = str(path / "simd_kernels")
    command = [compiler, *C_FLAGS, *flags, f"-I{ROOT / 'proto' / 'codec'}", "-o", program]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "simd_kernels.c")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return program


def kernels_of(*command: str) -> list[str]:
    """Runs the program; the kernels that it found to be right."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    verdict, _, names = done.stdout.partition(":")
    assert verdict.startswith("OK "), done.stdout
    return names.split()


@pytest.mark.emulation
def test_kernels_of_this_processor_in_c(tmp_path):
    """On every length of a page."""
    need_program("gcc")
    assert kernels_of(compiled(tmp_path, "gcc"), "1") == NATIVE


@pytest.mark.emulation
def test_neon_kernel_under_emulation(tmp_path):
    need_program("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    need_program("qemu-aarch64", "qemu-user")
    program = compiled(tmp_path, "aarch64-linux-gnu-gcc", "-static")
    assert kernels_of("qemu-aarch64", program, "3") == ["neon", "portable"]


@pytest.mark.emulation
def test_avx512_kernel_in_plain_c(tmp_path):
    need_program("gcc")
    if platform.machine() != "x86_64":
        pytest.skip("proto/codec/_diff.h has this kernel on x86-64 only")
    probe = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"],
        input="#include <simde/x86/avx512.h>\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    need(probe.returncode == 0, "simde is not installed (libsimde-dev)")
    flags = ("-Wno-psabi", "-DALL_KERNELS", f"-I{ROOT / 'tests' / 'emulated'}")
    assert kernels_of(compiled(tmp_path, "gcc", *flags), "3") == ["avx512bw", "avx2", "portable"]

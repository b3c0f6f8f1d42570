"""How fast pages are encoded and decoded, as multiples of comparing them with memcmp.

QEMU's encoder cannot be run here. Its figures were measured once, on a machine with AVX-512, beside
memcmp over the same pages; what is compared is the multiple of memcmp, each from its own machine.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from proto.codec import _xbzrle
from proto.xbzrle import decode_pages, encode_pages
from tests.bench.report import Options, Part, Table
from tests.bench.turns import median

PAGE = 4096
PAGES = 128
SIZE = PAGES * PAGE
REPEATS = 20
QEMU_MEMCMP = 70.0


@dataclass(frozen=True)
class Pattern:
    """What changes in a page; GB/s of QEMU's encoder (scalar, AVX-512) and of its decoder."""

    name: str
    changes: Callable[[random.Random], Iterable[int]]
    scalar: float = 0
    avx512: float = 0
    decoder: float = 0


def _words(rng: random.Random) -> Iterable[int]:
    return (8 * word + i for word in rng.sample(range(PAGE // 8), 64) for i in range(8))


def _run(rng: random.Random) -> Iterable[int]:
    start = rng.randrange(PAGE - 20)
    return range(start, start + 20)


def _every(step: int) -> Callable[[random.Random], Iterable[int]]:
    return lambda _rng: range(0, PAGE, step)


PATTERNS = (
    Pattern("none", lambda _rng: (), 21, 40),
    Pattern("1 byte per KiB", _every(1024), 16, 23, 72),
    Pattern("one run of 20 bytes", _run, 18, 30),
    Pattern("64 random 8-byte words", _words, 3.7, 5.2),
    Pattern("410 random bytes", lambda rng: rng.sample(range(PAGE), 410), 0.5, 1.4),
    Pattern("every 16th byte", _every(16), 0.74, 1.24, 3.9),
    Pattern("every 8th byte", _every(8), 0.54, 0.62, 2.3),
    Pattern("every 4th byte", _every(4), 0.63, 0.46, 1.2),
    Pattern("every 2nd byte (overflow)", _every(2), 0.6, 0.65),
    Pattern("all bytes (overflow)", _every(1), 10, 39),
    Pattern("every 256th byte", _every(256), decoder=27),
    Pattern("every 64th byte", _every(64), decoder=11.7),
    Pattern("410 random bytes in 1 KiB", lambda rng: rng.sample(range(1024), 410)),
    Pattern("every 2nd byte of the first half", lambda _rng: range(0, PAGE // 2, 2)),
)


def _pages() -> memoryview:
    return memoryview(mmap.mmap(-1, SIZE + 2 * PAGE))


@dataclass
class Case:
    """Old and new pages of one pattern, and room for their deltas."""

    pattern: Pattern
    old: memoryview
    new: memoryview
    out: memoryview
    lengths: array[int]

    @classmethod
    def make(cls, pattern: Pattern) -> Case:
        rng = random.Random(pattern.name)
        old, new = _pages(), _pages()
        old[:SIZE] = new[:SIZE] = rng.randbytes(SIZE)
        for page in range(PAGES):
            for at in pattern.changes(rng):
                new[page * PAGE + at] ^= 0xFF
        return cls(pattern, old[:SIZE], new[:SIZE], _pages(), array("i", bytes(4 * PAGES)))

    def encode(self, merge: bool = False) -> int:
        return encode_pages(self.old, self.new, PAGE, self.out, self.lengths, merge)

    def decode(self) -> None:
        decode_pages(self.out, self.lengths, self.old, PAGE)


def run(options: Options) -> Part:
    turns = options.turns(5) * 3
    cases = [Case.make(pattern) for pattern in PATTERNS]
    simds = [name for name, usable in _xbzrle.simd_kernels().items() if usable]
    times: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    try:
        for _ in range(turns):
            _measure(cases, simds, times, sizes)
    finally:
        _xbzrle.use_simd()
    speeds = {name: SIZE / median(taken) / 1e9 for name, taken in times.items()}
    call = median(times["call"])
    data = {"gb_per_second": speeds, "bytes_per_page": sizes, "simd": simds, "call_seconds": call}
    return Part(
        "codec", "Codec",
        f"{PAGES} pages of 4 KiB, encoded by one call from Python; GB/s (10^9 bytes) of page data. "
        f"Medians of {turns} turns through all rows. x memcmp: the speed as a multiple of memcmp "
        "over two equal copies of as many pages, in the same run. QEMU: the same multiple of its "
        "AVX-512 encoder, measured once on a machine where memcmp does 70 GB/s. "
        f"The kernel in use here is {simds[0]}.",
        [_encoding(data), _decoding(data), _merging(data), *_kernels(data)], data, _notes(data),
    )  # fmt: skip


def _measure(
    cases: list[Case], simds: list[str], times: dict[str, list[float]], sizes: dict[str, float]
) -> None:
    """One turn through all rows."""

    def take(name: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        for _ in range(REPEATS):
            work()
        times.setdefault(name, []).append((time.perf_counter() - began) / REPEATS)

    equal = cases[0]
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    addresses = [
        ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (equal.old, equal.new)
    ]
    take("memcmp", lambda: memcmp(*addresses, SIZE))
    nothing = array("i"), memoryview(b"")
    take("call", lambda: encode_pages(nothing[1], nothing[1], PAGE, equal.out, nothing[0]))
    for case in cases:
        name = case.pattern.name
        for simd in simds:
            _xbzrle.use_simd(simd)
            take(f"{simd}: {name}", case.encode)
        _xbzrle.use_simd()
        for kind, merge in (("merged", True), ("canonical", False)):
            take(f"{kind}: {name}", partial(case.encode, merge))
            length = case.encode(merge)
            sizes[f"{kind}: {name}"] = length / PAGES
            if length:
                # Deltas carry new bytes: applying them again writes the same ones.
                before = bytes(case.old)
                take(f"decode {kind}: {name}", case.decode)
                case.old[:] = before


def _times(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _encoding(data: dict[str, Any]) -> Table:
    speeds = data["gb_per_second"]
    rows, product, count = [], 1.0, 0
    ratios: dict[str, float] = data.setdefault("ratios", {})
    for pattern in PATTERNS:
        if not pattern.avx512:
            continue
        speed = speeds[f"canonical: {pattern.name}"]
        ours, theirs = speed / speeds["memcmp"], pattern.avx512 / QEMU_MEMCMP
        product, count = product * ours / theirs, count + 1
        ratios[pattern.name] = ours / theirs
        rows.append([
            pattern.name, f"{speed:.2f}", _times(ours), _times(theirs), f"{ours / theirs:.2f}"
        ])  # fmt: skip
    data["geometric_mean"] = product ** (1 / count)
    rows.append(["geometric mean", "", "", "", f"{data['geometric_mean']:.2f}"])
    head = ("encoding: what changed", "GB/s", "x memcmp", "QEMU: x memcmp", "ours / QEMU's")
    return Table(head, rows)


def _decoding(data: dict[str, Any]) -> Table:
    speeds = data["gb_per_second"]
    rows = []
    for pattern in PATTERNS:
        if not pattern.decoder:
            continue
        speed = speeds[f"decode canonical: {pattern.name}"]
        ours, theirs = speed / speeds["memcmp"], pattern.decoder / QEMU_MEMCMP
        rows.append([
            pattern.name, f"{speed:.1f}", f"{pattern.decoder:g}", f"{speed / pattern.decoder:.2f}",
            f"{ours / theirs:.2f}",
        ])  # fmt: skip
    head = ("decoding: what changed", "GB/s", "QEMU: GB/s", "ratio", "ratio of x memcmp")
    return Table(head, rows)


def _merging(data: dict[str, Any]) -> Table:
    speeds, sizes = data["gb_per_second"], data["bytes_per_page"]
    rows = []
    for pattern in PATTERNS:
        plain, merged = f"canonical: {pattern.name}", f"merged: {pattern.name}"
        if not sizes[merged]:
            continue
        shorter = f"{sizes[merged] / sizes[plain]:.3f}" if sizes[plain] else "overflow"
        decode = "-"
        if sizes[plain]:
            decode = f"{speeds[f'decode {merged}'] / speeds[f'decode {plain}']:.2f}"
        rows.append([
            pattern.name, f"{sizes[plain]:.0f}", f"{sizes[merged]:.0f}", shorter,
            f"{speeds[merged] / speeds[plain]:.2f}", decode,
        ])  # fmt: skip
    head = (
        "merged gaps: what changed", "bytes", "merged", "size", "speed, encoding", "decoding"
    )  # fmt: skip
    return Table(head, rows)


def _kernels(data: dict[str, Any]) -> list[Table]:
    speeds, simds = data["gb_per_second"], data["simd"]
    rows = [
        [pattern.name, *(f"{speeds[f'{simd}: {pattern.name}']:.2f}" for simd in simds)]
        for pattern in PATTERNS
    ]
    return [Table(("GB/s by kernel", *simds), rows)]


def _notes(data: dict[str, Any]) -> list[str]:
    shares = [
        (data["call_seconds"] / (SIZE / 1e9 / data["gb_per_second"][f"canonical: {pattern.name}"]))
        for pattern in PATTERNS
    ]
    return [
        f"A call from Python takes {data['call_seconds'] * 1e6:.2f} us without a page, which is "
        f"{min(shares):.1%} to {max(shares):.1%} of the calls measured here.",
        f"memcmp: {data['gb_per_second']['memcmp']:.1f} GB/s.",
    ]

"""What every contender has to move, and what came of one attempt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.report import size_name


@dataclass(frozen=True)
class Workload:
    """A guest of `size` bytes, all random; one byte each `stride` bytes below `hot` is counted up
    for ever, `rate` times a second (0: as fast as each program's guest can).

    downtime_limit, patience -- seconds: the pause aimed at, and when an attempt is given up
    link                     -- bits per second
    """

    size: int = 512 << 20
    hot: int = 128 << 20
    stride: int = 4096
    rate: int = 80_000
    downtime_limit: float = 0.3
    patience: float = 40.0
    link: int = 10**9

    @property
    def cache(self) -> int:
        """Bytes of the page cache for deltas: the hot set, as a power of two."""
        return 1 << (self.hot - 1).bit_length()

    @property
    def title(self) -> str:
        pace = (
            f"{self.rate:,} increments a second".replace(",", " ")
            if self.rate
            else "increments at full speed"
        )
        return f"{pace} over {size_name(self.hot)} of {size_name(self.size)}"

    def numbers(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Attempt:
    """seconds: in all; downtime: seconds the guest stood still, None where it never moved.

    expected -- the last forecast of the downtime in seconds, where the program makes one
    memory   -- what a comparison of the memory that arrived says
    detail   -- more numbers, for bench.json
    """

    completed: bool
    why: str
    seconds: float
    link_bytes: int
    downtime: float | None
    expected: float | None
    memory: str
    detail: dict[str, Any]

    def numbers(self) -> dict[str, Any]:
        return asdict(self)

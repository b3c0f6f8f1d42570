"""A set of pages as a dirty bitmap: bit `page % 8` of byte `page // 8`, in whole 8-byte words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class PageSet:
    """Pages 0 to `pages` - 1, each in or out. `bits` is the bitmap itself, for the kernels."""

    def __init__(self, pages: int, members: Iterable[int] = ()) -> None:
        self.pages = pages
        self.bits = bytearray((pages + 63) // 64 * 8)
        for page in members:
            self.add(page)

    @classmethod
    def full(cls, pages: int) -> PageSet:
        """Every page of the guest."""
        result = cls(pages)
        length = len(result.bits)
        result.bits[:] = ((1 << pages) - 1).to_bytes(length, "little")
        return result

    def add(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        self.bits[page >> 3] |= 1 << (page & 7)

    def __contains__(self, page: int) -> bool:
        return 0 <= page < self.pages and bool(self.bits[page >> 3] >> (page & 7) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self.bits, "little").bit_count()

    def count_from(self, page: int) -> int:
        """How many members there are from `page` on."""
        rest = int.from_bytes(self.bits[page >> 3 :], "little") >> (page & 7)
        return rest.bit_count()

    def __iter__(self) -> Iterator[int]:
        return (page for page in range(self.pages) if page in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageSet) and (self.pages, self.bits) == (other.pages, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def __ior__(self, other: PageSet) -> PageSet:
        if other.pages != self.pages:
            raise ValueError(f"sets of {self.pages} and {other.pages} pages")
        both = int.from_bytes(self.bits, "little") | int.from_bytes(other.bits, "little")
        self.bits[:] = both.to_bytes(len(self.bits), "little")
        return self

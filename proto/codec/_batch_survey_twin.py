"""A survey of the batches of a captured stream, in plain Python: see _batch_survey.pyx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.codec._batch_twin import HEAD, OP_DELTA, OP_RAW, add_to_check, read_record
from proto.codec._hashes_twin import PageHashes
from proto.codec._xbzrle_twin import MAX_PAGE_SIZE, delta_runs
from proto.codec.faults import BAD_CHECK, BAD_DATA, PAST_GUEST, FaultError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_PAGES = 1 << 32


class BatchSurvey:
    """Reads bodies of PAGES without a guest.

    pages, page_size -- of the guest, 0 if not known
    seed             -- of its page hashes; empty if not known: raw pages are not checked then
    whole            -- the stream holds every page that is sent, so a delta without a base is wrong
    """

    def __init__(self, pages: int, page_size: int, seed: bytes, *, whole: bool = True) -> None:
        if pages > MOST_PAGES or not 0 <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"{pages} pages of {page_size} bytes")
        self.pages = pages or MOST_PAGES
        self.page_size = page_size or MAX_PAGE_SIZE
        self.whole = whole and pages > 0
        self._known_size = page_size > 0
        self._keyed = PageHashes(1, page_size, seed) if page_size and seed else None
        self._received: set[int] = set()

    @property
    def received_pages(self) -> int:
        return len(self._received)

    def read(
        self, head: Buffer, data: Buffer
    ) -> tuple[int, int, int, int, int, int, int, int, int, str]:
        """Read one body.

        Returns (round, first page, zero, raw, delta pages, bytes of deltas, bytes that they change,
        deltas without a base, the byte at which it is wrong, what is wrong there). The counts go up
        to that byte; the text is "" if all is right.
        """
        head, content = bytes(head), bytes(data)
        if len(head) <= HEAD:
            what = f"a batch of {len(head)} bytes holds no record"
            return 0, 0, 0, 0, 0, 0, 0, 0, 0, what
        number, first = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:12], "big")
        zero = raw = delta = delta_bytes = changed = baseless = 0
        at, next_page, what = HEAD, first, ""
        try:
            if first >= self.pages:
                at = 4
                raise FaultError(PAST_GUEST)
            while at < len(head):
                record, after = read_record(head, at, next_page, self.pages, self.page_size)
                if record.op == OP_DELTA:
                    changed += sum(len(run) for _, run in delta_runs(record.delta, self.page_size))
                    delta += 1
                    delta_bytes += len(record.delta)
                    baseless += self.whole and record.first not in self._received
                elif record.op == OP_RAW:
                    raw += record.count
                else:
                    zero += record.count
                if self.whole:
                    self._received.update(record.pages)
                next_page, at = record.first + record.count, after
            size = self.page_size
            if not self._known_size and raw:
                size = len(content) // raw
            if raw * size != len(content):
                raise FaultError(BAD_DATA)
            if self._keyed is not None and _check(self._keyed, content, size) != head[12:HEAD]:
                at = 12
                raise FaultError(BAD_CHECK)
        except FaultError as fault:
            what = str(fault)
        return number, first, zero, raw, delta, delta_bytes, changed, baseless, at, what


def _check(hashes: PageHashes, content: bytes, size: int) -> bytes:
    """Return the check of raw pages, as it stands in the head of their batch."""
    check = 0
    for i in range(0, len(content), size):
        check = add_to_check(check, hashes.hash_of(content[i : i + size]))
    return check.to_bytes(8, "big")

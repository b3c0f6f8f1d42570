"""The faults of a delta or a batch, in words.

The kernels return the numbers of `_faults.pxd`; the twins raise FaultError with the sentence. Both
end in a DecodeError that also names the page and the byte.
"""

from __future__ import annotations

SHORT = "the data ends inside a record"
BAD_LENGTH = "a length does not end where it must"
ZERO_RUN = "an empty zero run inside a delta"
PAST_PAGE = "a run goes past the end of the page"
EMPTY_RUN = "an empty non-zero run"
PAST_DELTA = "a non-zero run goes past the end of the delta"
BAD_OP = "an unknown record type"
PAST_GUEST = "a page number outside the guest"
NO_BASE = "a delta for a page that was never sent"
EMPTY_DELTA = "a delta with no bytes, or longer than a page"
BAD_DATA = "the raw records do not name as many pages as came"
BAD_CHECK = "the content of its raw pages does not match their check"

# By the numbers of _faults.pxd: -1, -2 and so on.
FAULTS = dict(
    zip(
        range(-1, -13, -1),
        (
            SHORT, BAD_LENGTH, ZERO_RUN, PAST_PAGE, EMPTY_RUN, PAST_DELTA, BAD_OP, PAST_GUEST,
            NO_BASE, EMPTY_DELTA, BAD_DATA, BAD_CHECK,
        ),
        strict=True,
    )
)  # fmt: skip


class FaultError(Exception):
    """What is wrong with the bytes, raised before it is known where they stand."""

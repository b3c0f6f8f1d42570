"""The numbers of the faults: negative, so that a function can return a length or a fault.

The sentences are in proto/codec/faults.py, in the same order.
"""

cdef enum Fault:
    SHORT = -1
    BAD_LENGTH = -2
    ZERO_RUN = -3
    PAST_PAGE = -4
    EMPTY_RUN = -5
    PAST_DELTA = -6
    BAD_OP = -7
    PAST_GUEST = -8
    NO_BASE = -9
    EMPTY_DELTA = -10
    BAD_DATA = -11
    BAD_CHECK = -12

"""The record of a page in QEMU's RAM section, version 4 (proto/README.md, "Streams").

    record = word [n name] body         word = offset of the page in its block | flags, big-endian
    ZERO     body: 00                   XBZRLE   body: 01, u16 length, the delta
    PAGE     body: the page             EOS      the word alone: the section ends
    CONTINUE the block is that of the last record, and [n name] is left out

Offsets are multiples of the page size, so the low bits of the word are free for the flags.
"""

cdef enum:
    MAX_BLOCKS = 1024           # as many as BLOCKS can name (proto/README.md, "Limits")
    MAX_NAME = 255              # bytes of a block's name, whose length has one byte
    FLAG_ZERO = 0x02
    FLAG_PAGE = 0x08
    FLAG_EOS = 0x10
    FLAG_CONTINUE = 0x20
    FLAG_XBZRLE = 0x40
    ENCODING = 1                # XBZRLE, the only one there is

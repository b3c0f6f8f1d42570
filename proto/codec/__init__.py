"""The codec: deltas, the page cache, batches of pages, bitmaps, and their compiled kernels.

_xbzrle        one page as a delta against its old contents, and back (_diff.h finds what differs)
_cache         the old contents of pages: found, kept, evicted
_encoder       the source: dirty pages in, batches out; it picks the record of each page
_decoder       the destination: checks a batch, then applies it to memory
_batch         the layout of a batch (proto/README.md)
_batch_survey  checks the batches of a captured stream, for migrate-stream
_hashes        a hash of each page, and the digest of all
_peer_copy     what the source knows of the pages that the destination has
_heat          how often, and how lately, a page was sent again
_bitmaps, _bits, _slab   tables and bitmaps that take memory only for what was written
pageset        a set of pages
faults         what is wrong with a batch, in words
kernel         chooses the compiled kernels or their twins

Each kernel has a twin in plain Python (_..._twin), which says what it means without how it is made
fast. Both pass the same tests.
"""

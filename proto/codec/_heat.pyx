# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
"""How hot each page is: how often, and how lately, it was sent again.

How hot a page is tells how large a cache would pay off. Each sending of a page that the peer has
and that is zero neither there nor here adds SENDING to its heat. Every COOL_SURVEYS rounds all heat
is halved, so that a phase of long ago is forgotten; but not before half as many pages were sent
again as have any heat, since short rounds would otherwise cool pages that had no chance to be sent.

A byte per page is enough. SENDING is an eighth of the scale: eight sendings in a row saturate it,
and eight halvings make any page cold. A survey reads one flag per WARM_BLOCK pages and skips blocks
without heat, as most blocks of a large guest are.

The readable twin is proto/codec/_heat_twin.py.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from proto.codec._bits cimport xb_popcount


cdef class PageHeat:
    """The heat of every page of a guest.

    pages -- of the guest
    """

    def __cinit__(self, uint64_t pages):
        cdef uint64_t blocks = (pages + WARM_BLOCK - 1) // WARM_BLOCK
        self.pages = pages
        self.heats_memory = ZeroedMemory(blocks * WARM_BLOCK, True)
        self.heated_memory = ZeroedMemory(blocks)
        self.heats = self.heats_memory.at
        self.heated = self.heated_memory.at

    def sample(self):
        """Return what was sent again and what is hot now. It is called after each round.

        Returns (sendings since the last survey, by the heat that their pages had before; pages by
        the heat that they have), each a list of 256 numbers.
        """
        cdef uint64_t[256] counts
        cdef uint64_t page = 0, stop, cold = 0
        sendings = [self.sendings[heat] for heat in range(256)]
        self.surveys += 1
        memset(counts, 0, sizeof(counts))
        memset(self.sendings, 0, sizeof(self.sendings))
        with nogil:
            if self.surveys >= COOL_SURVEYS and 2 * self.resent >= self.warm_pages:
                self.cool()
            while page < self.pages:
                stop = page + WARM_BLOCK if self.pages - page > WARM_BLOCK else self.pages
                if not self.heated[page // WARM_BLOCK]:
                    cold += stop - page
                    page = stop
                while page < stop:
                    counts[self.heats[page]] += 1
                    page += 1
            counts[0] += cold
        return sendings, [counts[heat] for heat in range(256)]

    cdef void cool(self) noexcept nogil:
        """Halve the heat of all pages, eight at a time."""
        cdef uint64_t* words = <uint64_t*>self.heats
        cdef uint64_t block, i, word, before
        self.warm_pages = 0
        self.resent = self.surveys = 0
        for block in range((self.pages + WARM_BLOCK - 1) // WARM_BLOCK):
            if not self.heated[block]:
                continue
            before = self.warm_pages
            for i in range(block * (WARM_BLOCK // 8), (block + 1) * (WARM_BLOCK // 8)):
                word = words[i]
                if word == 0:
                    continue
                word = word >> 1 & 0x7F7F7F7F7F7F7F7Fu
                words[i] = word
                # Each byte has seven bits now: adding 7F carries into the eighth if it is not 0.
                self.warm_pages += xb_popcount(word + 0x7F7F7F7F7F7F7F7Fu & 0x8080808080808080u)
            self.heated[block] = self.warm_pages > before

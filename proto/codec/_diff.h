/* Finds where two pages differ, as runs of bytes: one kernel per instruction set, one result.

       old, new  --compare-->  a bit per byte: does it differ?  --count, list-->  runs

   A kernel compares 64 bytes of both pages at a time and makes one word of them, whose bit k tells
   whether byte k differs, and a `busy` bit for each word that is not zero. The comparison does not
   branch on what it finds, so it runs at the speed of memory. All that follows is the same for all
   kernels and works on these words alone: 64 words stand for a page of 4 KiB.

     1. The bits that are set, and those at which a run begins, are counted: a population count per
        word. A run costs its bytes and two lengths of one byte at least. If the sum is over the
        room for the delta, the page overflows, and no run was ever listed.
     2. The runs are listed: the first bits of runs, then the last ones, each found by counting
        trailing zeros. A word without changes is passed over by its `busy` bit.

   So a page that overflows costs its comparison, and a page that hardly changed costs little more
   than memcmp. QEMU finds the runs inside the comparison, and pays for it where runs are short:
   with every 4th byte changed its AVX-512 encoder does 0.46 GB/s and its scalar one 0.63.

   Only this file knows instruction sets. The kernel is chosen when the module is loaded
   (_xbzrle.use_simd), by what the processor can do and not by what the compiler was told, so that
   one wheel fits all machines. */

#ifndef XBMIGRATE_DIFF_H
#define XBMIGRATE_DIFF_H

#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#define XB_INLINE static inline __attribute__((always_inline))

/* A page has at most 256 blocks of 64 bytes, and a run at most for every second byte; xb_list may
   write up to three entries past the last one. */
enum { XB_MAX_PAGE = 16384, XB_BLOCKS = XB_MAX_PAGE / 64, XB_RUN_ROOM = XB_MAX_PAGE / 2 + 64,
       XB_DENSE = 21 };

struct xb_runs {
    uint16_t start[XB_RUN_ROOM];    /* first byte that differs */
    uint16_t end[XB_RUN_ROOM];      /* first byte after it that agrees */
};

struct xb_words {
    uint64_t m[XB_BLOCKS + 2];      /* m[i + 1] is block i; a zero word stands at either end, so
                                       that the neighbours of a block can always be read */
    uint64_t busy[XB_BLOCKS / 64];  /* a bit per block that is not zero */
};

/* Returns the number of runs, 0 for equal pages, -1 if no delta of `room` bytes can hold them. With
   `merge`, gaps of one and two equal bytes are closed if the delta is no longer for it. */
typedef ssize_t (*xb_diff_fn)(const uint8_t *, const uint8_t *, size_t, size_t, int,
                              struct xb_runs *);

/* ---- from words to runs: the same for all, but compiled into each kernel, with the population
   count and the bit instructions of its instruction set */

/* Returns word w[0] with the gaps closed that are no shorter to skip than to send: skipping a gap
   costs two lengths, two bytes or more.

   A gap of one byte is always shorter to send. A gap of two costs the same either way, and closing
   it saves both sides a run; but not if the run then gets 128 bytes or more, whose length takes a
   second byte. No such run can come about if this word does not become full and neither neighbour
   can: for that every third byte of a word must have changed, XB_DENSE of 64. Gaps of two across
   the border of a word stay. sparse -- the word before has fewer changed bytes than XB_DENSE. */
XB_INLINE uint64_t xb_filled(const uint64_t *w, int sparse)
{
    uint64_t before = w[-1] >> 63, after = w[1] << 63;
    uint64_t one = w[0] | ((w[0] << 1 | before) & (w[0] >> 1 | after));
    uint64_t two = ~one & ~(one >> 1) & (one << 1 | before) & (one >> 2 | w[1] << 62) & ~0ull >> 1;
    uint64_t both = one | two | two << 1;
    /* Without branches: the processor could predict none of them. */
    return (both != ~0ull) & sparse & (__builtin_popcountll(w[1]) < XB_DENSE) ? both : one;
}

/* Closes the gaps of word i; returns i + 1 if it was dense before, for the next word to know. */
XB_INLINE size_t xb_fill(uint64_t *m, size_t i, size_t after_dense)
{
    int dense = __builtin_popcountll(m[i]) >= XB_DENSE;
    m[i] = xb_filled(m + i, after_dense != i);
    return dense ? i + 1 : after_dense;
}

/* Lists the positions of the bits as `base` + bit; returns how many there are. */
XB_INLINE size_t xb_list(uint64_t bits, unsigned base, uint16_t *at)
{
    size_t count = (size_t)__builtin_popcountll(bits);
    uint16_t *end = at + count;
    /* Four at a time, though fewer may be left: a loop of unknown length costs more. */
    while (at < end) {
        for (int k = 0; k < 4; k++) {
            at[k] = (uint16_t)(base + (unsigned)__builtin_ctzll(bits | 1ull << 63));
            bits &= bits - 1;
        }
        at += 4;
    }
    return count;
}

/* Walks the words that are busy, in order. If most of them are, a plain loop over all is faster;
   the others are zero and change nothing. */
#define XB_EACH_WORD(i)                                                                            \
    for (size_t i, g_ = 0; g_ < groups; g_++)                                                      \
        for (uint64_t b_ = words->busy[g_]; b_ && (i = 64 * g_ + (size_t)__builtin_ctzll(b_), 1);  \
             b_ &= b_ - 1)

XB_INLINE ssize_t xb_words_to_runs(struct xb_words *words, size_t blocks, size_t room, int merge,
                                   struct xb_runs *runs)
{
    uint64_t *m = words->m + 1, *before = words->m;
    size_t changed = 0, count = 0, starts = 0, ends = 0, busy = 0;
    size_t groups = (blocks + 63) / 64;
    for (size_t g = 0; g < groups; g++)
        busy += (size_t)__builtin_popcountll(words->busy[g]);
    if (busy == 0)
        return 0;
    if (merge) {
        /* In place: a byte that is filled in makes no word busy that was not, and no other byte
           worth filling. */
        size_t after_dense = (size_t)-1;
        if (2 * busy > blocks) {
            for (size_t i = 0; i < blocks; i++)
                after_dense = xb_fill(m, i, after_dense);
        } else {
            XB_EACH_WORD(i)
                after_dense = xb_fill(m, i, after_dense);
        }
    }
    if (2 * busy > blocks) {
        for (size_t i = 0; i < blocks; i++) {
            changed += (size_t)__builtin_popcountll(m[i]);
            count += (size_t)__builtin_popcountll(m[i] & ~(m[i] << 1 | before[i] >> 63));
        }
    } else {
        XB_EACH_WORD(i) {
            changed += (size_t)__builtin_popcountll(m[i]);
            count += (size_t)__builtin_popcountll(m[i] & ~(m[i] << 1 | before[i] >> 63));
        }
    }
    if (changed + 2 * count > room)
        return -1;
    XB_EACH_WORD(i) {
        uint64_t first = m[i] & ~(m[i] << 1 | before[i] >> 63);
        uint64_t last = m[i] & ~(m[i] >> 1 | m[i + 1] << 63);
        starts += xb_list(first, (unsigned)(64 * i), runs->start + starts);
        ends += xb_list(last, (unsigned)(64 * i + 1), runs->end + ends);
    }
    return (ssize_t)count;
}

/* ---- from pages to words: one way per instruction set

   XB_KERNEL makes a kernel of two functions. `quarter` compares 256 bytes, writes four words and
   returns which of them are busy: usually none, which one test of all 256 bytes shows. `block`
   compares 64 bytes, for the end of the page. What is less than a block is copied out first, so
   that no byte outside a page is read. */

#define XB_KERNEL(NAME, TARGET, QUARTER, BLOCK)                                                    \
    TARGET static ssize_t NAME(const uint8_t *old, const uint8_t *new, size_t size, size_t room,   \
                               int merge, struct xb_runs *runs)                                    \
    {                                                                                              \
        struct xb_words words;                                                                     \
        size_t i = 0, blocks = size / 64, rest = size % 64;                                        \
        words.m[0] = 0;                                                                            \
        memset(words.busy, 0, sizeof words.busy);                                                  \
        for (; i + 4 <= blocks; i += 4)                                                            \
            words.busy[i / 64] |= QUARTER(old + 64 * i, new + 64 * i, words.m + 1 + i) << i % 64;  \
        for (; i < blocks; i++) {                                                                  \
            words.m[1 + i] = BLOCK(old + 64 * i, new + 64 * i);                                    \
            words.busy[i / 64] |= (uint64_t)(words.m[1 + i] != 0) << i % 64;                       \
        }                                                                                          \
        if (rest) {                                                                                \
            uint8_t a[64] = {0}, b[64] = {0};                                                      \
            memcpy(a, old + 64 * i, rest);                                                         \
            memcpy(b, new + 64 * i, rest);                                                         \
            words.m[1 + i] = BLOCK(a, b);                                                          \
            words.busy[i / 64] |= (uint64_t)(words.m[1 + i] != 0) << i % 64;                       \
            i++;                                                                                   \
        }                                                                                          \
        words.m[1 + i] = 0;                                                                        \
        return xb_words_to_runs(&words, i, room, merge, runs);                                     \
    }

XB_INLINE uint64_t xb_busy(const uint64_t *m)
{
    return (uint64_t)(m[0] != 0) | (uint64_t)(m[1] != 0) << 1 | (uint64_t)(m[2] != 0) << 2 |
           (uint64_t)(m[3] != 0) << 3;
}

/* Portable: 8 bytes at a time, in little-endian order on any machine. A byte of x is not zero if
   adding 7F to its low seven bits carries into bit 7, or if bit 7 is set. The multiplication then
   gathers the eight bits 7 in the highest byte. */

XB_INLINE uint64_t xb_load(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

XB_INLINE uint64_t xb_block_portable(const uint8_t *a, const uint8_t *b)
{
    const uint64_t low = 0x7F7F7F7F7F7F7F7Full;
    uint64_t word = 0;
    for (int k = 0; k < 8; k++) {
        uint64_t x = xb_load(a + 8 * k) ^ xb_load(b + 8 * k);
        uint64_t high = (((x & low) + low) | x) & ~low;     /* the high bit of each byte not zero */
        word |= ((high >> 7) * 0x0102040810204080ull >> 56) << 8 * k;
    }
    return word;
}

XB_INLINE uint64_t xb_quarter_portable(const uint8_t *a, const uint8_t *b, uint64_t *m)
{
    uint64_t busy = 0;
    for (int i = 0; i < 4; i++, a += 64, b += 64) {
        uint64_t differ = 0;
        for (int k = 0; k < 8; k++)
            differ |= xb_load(a + 8 * k) ^ xb_load(b + 8 * k);
        m[i] = differ ? xb_block_portable(a, b) : 0;
        busy |= (uint64_t)(differ != 0) << i;
    }
    return busy;
}

XB_KERNEL(xb_diff_portable, , xb_quarter_portable, xb_block_portable)

#if defined(__x86_64__)
#include <immintrin.h>

#define XB_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define XB_AVX512 __attribute__((target("avx512f,avx512bw,avx2,bmi,bmi2,popcnt")))

XB_AVX2 XB_INLINE __m256i xb_same_avx2(const uint8_t *a, const uint8_t *b)
{
    return _mm256_cmpeq_epi8(_mm256_loadu_si256((const void *)a),
                             _mm256_loadu_si256((const void *)b));
}

XB_AVX2 XB_INLINE uint64_t xb_word_avx2(__m256i low, __m256i high)
{
    return ~((uint64_t)(uint32_t)_mm256_movemask_epi8(low) |
             (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32);
}

XB_AVX2 XB_INLINE uint64_t xb_block_avx2(const uint8_t *a, const uint8_t *b)
{
    return xb_word_avx2(xb_same_avx2(a, b), xb_same_avx2(a + 32, b + 32));
}

XB_AVX2 XB_INLINE uint64_t xb_quarter_avx2(const uint8_t *a, const uint8_t *b, uint64_t *m)
{
    __m256i same[8], all;
    for (int k = 0; k < 8; k++)
        same[k] = xb_same_avx2(a + 32 * k, b + 32 * k);
    all = _mm256_and_si256(
        _mm256_and_si256(_mm256_and_si256(same[0], same[1]), _mm256_and_si256(same[2], same[3])),
        _mm256_and_si256(_mm256_and_si256(same[4], same[5]), _mm256_and_si256(same[6], same[7])));
    if (_mm256_movemask_epi8(all) == -1) {
        _mm256_storeu_si256((void *)m, _mm256_setzero_si256());
        return 0;
    }
    for (int i = 0; i < 4; i++)
        m[i] = xb_word_avx2(same[2 * i], same[2 * i + 1]);
    return xb_busy(m);
}

XB_KERNEL(xb_diff_avx2, XB_AVX2, xb_quarter_avx2, xb_block_avx2)

XB_AVX512 XB_INLINE uint64_t xb_block_avx512(const uint8_t *a, const uint8_t *b)
{
    return (uint64_t)_mm512_cmpneq_epi8_mask(_mm512_loadu_si512((const void *)a),
                                             _mm512_loadu_si512((const void *)b));
}

XB_AVX512 XB_INLINE uint64_t xb_quarter_avx512(const uint8_t *a, const uint8_t *b, uint64_t *m)
{
    for (int i = 0; i < 4; i++)
        m[i] = xb_block_avx512(a + 64 * i, b + 64 * i);
    return (m[0] | m[1] | m[2] | m[3]) ? xb_busy(m) : 0;
}

XB_KERNEL(xb_diff_avx512bw, XB_AVX512, xb_quarter_avx512, xb_block_avx512)
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

XB_INLINE uint64_t xb_block_neon(const uint8_t *a, const uint8_t *b)
{
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t same[4];
    for (int k = 0; k < 4; k++)
        same[k] = vandq_u8(vceqq_u8(vld1q_u8(a + 16 * k), vld1q_u8(b + 16 * k)), bit);
    uint8x16_t sum = vpaddq_u8(vpaddq_u8(same[0], same[1]), vpaddq_u8(same[2], same[3]));
    return ~vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}

XB_INLINE uint64_t xb_quarter_neon(const uint8_t *a, const uint8_t *b, uint64_t *m)
{
    uint8x16_t all = vdupq_n_u8(0xFF);
    for (int k = 0; k < 16; k++)
        all = vandq_u8(all, vceqq_u8(vld1q_u8(a + 16 * k), vld1q_u8(b + 16 * k)));
    if (vminvq_u8(all) == 0xFF) {
        memset(m, 0, 32);
        return 0;
    }
    for (int i = 0; i < 4; i++)
        m[i] = xb_block_neon(a + 64 * i, b + 64 * i);
    return xb_busy(m);
}

XB_KERNEL(xb_diff_neon, , xb_quarter_neon, xb_block_neon)
#endif

/* ---- the choice */

static const struct xb_kernel { const char *name; xb_diff_fn diff; } xb_kernels[] = {
#if defined(__x86_64__)
    {"avx512bw", xb_diff_avx512bw},
    {"avx2", xb_diff_avx2},
#endif
#if defined(__aarch64__)
    {"neon", xb_diff_neon},
#endif
    {"portable", xb_diff_portable},
};

enum { XB_KERNELS = sizeof xb_kernels / sizeof *xb_kernels };

static int xb_can_run(const char *name)
{
#if defined(__x86_64__)
    int bits = __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");
    if (!strcmp(name, "avx512bw"))
        return bits && __builtin_cpu_supports("avx512bw");
    if (!strcmp(name, "avx2"))
        return bits && __builtin_cpu_supports("avx2");
#endif
    (void)name;
    return 1;
}

#endif

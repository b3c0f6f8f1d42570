/* Compares every kernel of proto/codec/_diff.h with a loop over bytes that says the same in another way.

   Usage: simd_kernels [STEP]: small pages of every length, and those about as long as real ones, in
   all patterns; beyond that each STEP-th length in one. Prints "OK" and the kernels. Every page
   ends, or begins, where memory begins that may not be read: a kernel that looks past it crashes.

   ALL_KERNELS -- do not ask the processor which ones it can run (where they are emulated) */

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_diff.h"

enum { GUARD = 1 << 16 };

static uint64_t seed = 0x243F6A8885A308D3u;

static uint32_t below(uint32_t limit)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)((seed >> 32) * limit >> 32);
}

/* ---- what is right */

static uint8_t changed[XB_MAX_PAGE + 4], closed[XB_MAX_PAGE + 4];

static int at(const uint8_t *flags, ssize_t i, size_t size)
{
    return i >= 0 && i < (ssize_t)size && flags[i];
}

static size_t changed_in(ssize_t start, size_t size)
{
    size_t count = 0;
    for (ssize_t i = start; i < start + 64; i++)
        count += (size_t)at(changed, i, size);
    return count;
}

/* Closes gaps: of one byte always; of two inside 64 bytes unless these become full by it or either
   neighbour has so many changes that it could. */
static void close_gaps(size_t size)
{
    static uint8_t one[XB_MAX_PAGE + 4];
    for (ssize_t i = 0; i < (ssize_t)size; i++)
        one[i] = changed[i] || (at(changed, i - 1, size) && at(changed, i + 1, size));
    memcpy(closed, one, size);
    for (ssize_t start = 0; start < (ssize_t)size; start += 64) {
        ssize_t end = start + 64 < (ssize_t)size ? start + 64 : (ssize_t)size;
        size_t full = 0;
        for (ssize_t i = start; i + 1 < end; i++)
            if (!one[i] && !one[i + 1] && at(one, i - 1, size) && at(one, i + 2, size))
                closed[i] = closed[i + 1] = 1;
        for (ssize_t i = start; i < end; i++)
            full += closed[i];
        if (full == 64 || changed_in(start - 64, size) >= 21 || changed_in(start + 64, size) >= 21)
            memcpy(closed + start, one + start, (size_t)(end - start));
    }
}

static size_t length_of(size_t value)
{
    return value < 0x80 ? 1 : value < 0x4000 ? 2 : 3;
}

static struct xb_runs right;

/* Fills `right`; gives the number of runs, and how long their delta is. */
static ssize_t naive(const uint8_t *flags, size_t size, size_t room, size_t *length)
{
    size_t count = 0, sum = 0, end = 0;
    *length = 0;
    for (size_t i = 0; i < size;) {
        if (!flags[i]) {
            i++;
            continue;
        }
        size_t start = i;
        while (i < size && flags[i])
            i++;
        right.start[count] = (uint16_t)start;
        right.end[count++] = (uint16_t)i;
        sum += i - start;
        *length += length_of(start - end) + length_of(i - start) + i - start;
        end = i;
    }
    return sum + 2 * count > room ? -1 : (ssize_t)count;
}

/* ---- pages */

static const size_t lengths[] = {1, 1, 1, 2, 2, 3, 4, 7, 8, 9, 31, 32, 33, 61, 62, 63, 64, 65, 66,
                                 126, 127, 128, 129, 130, 191, 192, 255, 256, 257, 1000};

static size_t some_length(void)
{
    return lengths[below(sizeof lengths / sizeof *lengths)];
}

enum { PATTERNS = 10 };

/* Which bytes differ: 1 in `flags`. */
static void draw(int pattern, uint8_t *flags, size_t size)
{
    size_t i = 0, n;
    memset(flags, 0, size);
    switch (pattern) {
    case 0:                                     /* none, or all */
        memset(flags, (int)below(2), size);
        break;
    case 1:                                     /* one, often at an end */
        n = below(4);
        flags[n == 0 ? 0 : n == 1 ? size - 1 : below((uint32_t)size)] = 1;
        break;
    case 2:                                     /* a few */
        for (n = 1 + below(20); n; n--)
            flags[below((uint32_t)size)] = 1;
        break;
    case 3:                                     /* any part of them */
        n = below(257);
        for (; i < size; i++)
            flags[i] = below(256) < n;
        break;
    case 4:                                     /* the same gap all over */
        n = 2 + below(3);
        for (i = below(5); i < size; i += n)
            flags[i] = 1;
        break;
    case 5:                                     /* runs and gaps of awkward lengths */
        for (i = below(3) ? some_length() : 0; i < size; i += some_length())
            for (n = some_length(); n && i < size; n--)
                flags[i++] = 1;
        break;
    case 6:                                     /* short gaps: 1, 2, 3 */
        for (i = below(70); i < size; i += 2 + below(3))
            flags[i] = 1;
        break;
    case 7:                                     /* words about as dense as decides on gaps of two */
        for (; i < size; i += 64) {
            size_t room = size - i < 64 ? size - i : 64, first = below(3);
            if (below(2))
                for (n = first; n < room && n < first + 3 * (17 + below(7)); n += 3)
                    flags[i + n] = 1;
            else
                for (n = below(24); n; n--)
                    flags[i + below((uint32_t)room)] = 1;
        }
        break;
    case 8:                                     /* gaps around the ends of words */
        for (i = 0; i < size; i += 64)
            for (n = 0; n < 6; n++)
                if (i + n >= 3 && i + n - 3 < size)
                    flags[i + n - 3] = below(2) != 0;
        break;
    default:                                    /* all but a few */
        memset(flags, 1, size);
        for (n = below(8); n; n--)
            flags[below((uint32_t)size)] = 0;
    }
}

static uint8_t *guarded(void)
{
    uint8_t *whole = mmap(NULL, 3 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED || mprotect(whole + GUARD, GUARD, PROT_READ | PROT_WRITE)) {
        perror("mmap");
        exit(2);
    }
    return whole + GUARD;
}

static uint8_t *old_area, *new_area;
static struct xb_runs runs;
static unsigned long pages;

static void fail(const struct xb_kernel *kernel, const char *what, size_t size, int merge)
{
    printf("%s: %s, page of %zu bytes, merge %d, page %lu\n", kernel->name, what, size, merge,
           pages);
    exit(1);
}

static void compare(const struct xb_kernel *kernel, const uint8_t *old, const uint8_t *new,
                    size_t size, size_t room, int merge, ssize_t count)
{
    /* The lists may be written past their ends, but not into each other. */
    memset(&runs, 0xEE, sizeof runs);
    if (kernel->diff(old, new, size, room, merge, &runs) != count)
        fail(kernel, "another number of runs", size, merge);
    for (ssize_t i = 0; i < count; i++)
        if (runs.start[i] != right.start[i] || runs.end[i] != right.end[i])
            fail(kernel, "other runs", size, merge);
}

static void check(size_t size, int pattern)
{
    /* Each page lies at the end of its memory, or at the start. */
    size_t offset = below(4) ? GUARD - size : 0;
    uint8_t *old = old_area + offset, *new = new_area + (below(4) ? offset : GUARD - size - offset);
    static const uint8_t bits[] = {0x01, 0x80, 0x7F, 0xFF, 0x55, 0x10};
    uint8_t bit = bits[below(sizeof bits)];
    size_t plain, merged, room = below(3) ? size : below((uint32_t)size + 1);
    draw(pattern, changed, size);
    for (size_t i = 0; i < size; i++) {
        old[i] = (uint8_t)below(256);
        new[i] = changed[i] ? old[i] ^ (below(2) ? bit : (uint8_t)(1 + below(255))) : old[i];
    }
    for (int merge = 0; merge < 2; merge++) {
        if (merge)
            close_gaps(size);
        size_t *length = merge ? &merged : &plain;
        ssize_t count = naive(merge ? closed : changed, size, room, length);
        for (int k = 0; k < XB_KERNELS; k++) {
#ifndef ALL_KERNELS
            if (!xb_can_run(xb_kernels[k].name))
                continue;
#endif
            compare(&xb_kernels[k], old, new, size, room, merge, count);
        }
    }
    if (merged > plain)
        fail(&xb_kernels[0], "the merged delta is longer", size, 1);
    pages++;
}

int main(int argc, char **argv)
{
    size_t step = argc > 1 ? (size_t)atoi(argv[1]) : 1;
    old_area = guarded();
    new_area = guarded();
    for (size_t size = 1; size <= XB_MAX_PAGE; size++)
        if (size <= 400 || (size + 1) % 1024 <= 2)
            for (int pattern = 0; pattern < PATTERNS; pattern++)
                check(size, pattern);
        else if (size % step == 0)
            check(size, (int)(size / step % PATTERNS));
    for (int i = 0; i < 2000; i++)              /* those that are used most, and small odd ones */
        check(i % 2 ? 4096 : 1 + below(400), (int)below(PATTERNS));
    printf("OK %lu pages:", pages);
    for (int k = 0; k < XB_KERNELS; k++)
#ifndef ALL_KERNELS
        if (xb_can_run(xb_kernels[k].name))
#endif
            printf(" %s", xb_kernels[k].name);
    printf("\n");
    return 0;
}

# cython: language_level=3
"""The kernel's own record of written pages: userfaultfd write protection, and PAGEMAP_SCAN.

    protect   UFFDIO_REGISTER, mode WP, with WP_ASYNC: the first write to a protected page costs
              the writer one minor fault, no message and no handler, and marks the page as written
    collect   PAGEMAP_SCAN with WP_MATCHING: the runs of pages written since the last call, which
              are protected again in the same step, page by page: no write is lost between

A userfaultfd works on the memory of the process that made it, whoever holds the descriptor. When
the last copy is closed, all protection is gone and the writer runs as before. So a program of ours
that dies leaves nothing behind.

Nothing here decides whether the record can be trusted: see tracker.py. Facts about the interface:
Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst of Linux 6.7, the first that has both.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from proto.codec._bits cimport set_range

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Declared here, since the headers of the machine that builds may be older than its kernel. */
    struct xm_uffd_api { uint64_t api, features, ioctls; };
    struct xm_uffd_range { uint64_t start, len; };
    struct xm_uffd_register { struct xm_uffd_range range; uint64_t mode, ioctls; };
    struct xm_region { uint64_t start, end, categories; };
    struct xm_scan {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t inverted, mask, any_of, returned;
    };
    #define XM_UFFDIO_API _IOWR(0xAA, 0x3F, struct xm_uffd_api)
    #define XM_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct xm_uffd_register)
    #define XM_PAGEMAP_SCAN _IOWR('f', 16, struct xm_scan)
    #define XM_MODE_WP 2
    #define XM_FEATURES ((1u << 12) | (1u << 13) | (1u << 15)) /* WP_HUGETLBFS_SHMEM,
                                                                   WP_UNPOPULATED, WP_ASYNC */
    #define XM_WP_MATCHING 1
    #define XM_CHECK_WPASYNC 2
    #define XM_WRITTEN 2
    #ifndef __NR_userfaultfd
    #define __NR_userfaultfd -1
    #endif
    #define XM_USER_MODE_ONLY 1

    static int xm_userfaultfd(void)
    {
        return syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK | XM_USER_MODE_ONLY);
    }

    static int xm_negotiate(int fd)
    {
        struct xm_uffd_api api = { .api = 0xAA, .features = XM_FEATURES };
        return ioctl(fd, XM_UFFDIO_API, &api);
    }

    static int xm_protect(int fd, uint64_t start, uint64_t bytes)
    {
        struct xm_uffd_register range = { .range = { start, bytes }, .mode = XM_MODE_WP };
        return ioctl(fd, XM_UFFDIO_REGISTER, &range);
    }

    /* One call of PAGEMAP_SCAN. Returns how many regions there are, and how far it came. */
    static int xm_collect(int pagemap, int protect, uint64_t start, uint64_t end,
                          struct xm_region *regions, uint64_t room, uint64_t *walked)
    {
        struct xm_scan scan = {
            .size = sizeof scan, .flags = protect ? XM_WP_MATCHING | XM_CHECK_WPASYNC : 0,
            .start = start, .end = end, .vec = (uintptr_t)regions, .vec_len = room,
            .mask = XM_WRITTEN, .returned = XM_WRITTEN,
        };
        int found = ioctl(pagemap, XM_PAGEMAP_SCAN, &scan);
        *walked = scan.walk_end;
        return found;
    }

    /* Takes the events out of a perf ring; returns whether any were lost. Appends to `seen`, which
       holds `*count` pairs and has room for `room`: parent and child of a fork, 0 and the process
       that has mapped the file to write it. See perf_event_open(2) for the layout. */
    static int xm_drain(uint8_t *ring, uint64_t page, uint64_t size, const uint8_t *file,
                        uint32_t *seen, uint64_t room, uint64_t *count)
    {
        struct { uint32_t type; uint16_t misc, size; uint32_t words[16]; } record;
        uint64_t head = __atomic_load_n((uint64_t *)(ring + 1024), __ATOMIC_ACQUIRE);
        uint64_t tail = *(uint64_t *)(ring + 1032), left, want, i;
        uint32_t parent;
        int lost = 0, forked, mapped;
        for (; tail < head; tail += record.size) {
            left = head - tail;
            want = left < sizeof record ? left : sizeof record;
            for (i = 0; i < want; i++)
                ((uint8_t *)&record)[i] = ring[page + (tail + i) % size];
            if (record.size < 8 || record.size > left) {
                lost = 1;
                tail = head;
                break;
            }
            lost |= record.type == 2;
            parent = record.words[1];
            forked = record.type == 7 && parent != record.words[0];   /* else it is a thread */
            mapped = record.type == 10 && record.size >= 72   /* MMAP2: the file in words 8 to 11 */
                     && !memcmp(record.words + 8, file, 16)
                     && record.words[14] & 2 && record.words[15] & 1;   /* writable and shared */
            if (!forked && !mapped)
                continue;
            if (*count == room) {
                lost = 1;
                continue;
            }
            seen[2 * *count] = mapped ? 0 : parent;
            seen[2 * *count + 1] = record.words[0];
            ++*count;
        }
        __atomic_store_n((uint64_t *)(ring + 1032), tail, __ATOMIC_RELEASE);
        return lost;
    }

    /* fork(2) of libc calls what pthread_atfork was given; a child that runs another program at
       once (vfork, posix_spawn) has no part in our memory. */
    static volatile int xm_forks;
    static void xm_forking(void) { __atomic_add_fetch(&xm_forks, 1, __ATOMIC_SEQ_CST); }
    static int xm_count_forks(void) { return pthread_atfork(xm_forking, 0, 0); }
    """
    cdef struct xm_region:
        uint64_t start
        uint64_t end
    int xm_drain(
        uint8_t*, uint64_t, uint64_t, const uint8_t*, uint32_t*, uint64_t, uint64_t*
    ) nogil
    int xm_forks
    int xm_count_forks() nogil
    int xm_userfaultfd() nogil
    int xm_negotiate(int) nogil
    int xm_protect(int, uint64_t, uint64_t) nogil
    int xm_collect(int, bint, uint64_t, uint64_t, xm_region*, uint64_t, uint64_t*) nogil

cdef enum:
    # Regions that one call may return: 96 KiB. A call more costs less than a microsecond.
    REGIONS = 4096


def drain(
    uint8_t[::1] ring not None, uint64_t page, const uint8_t[::1] file not None,
    uint32_t[::1] seen not None, uint64_t count,
):
    """Take all events out of a perf ring. Return the new `count`, and whether any were lost.

    ring  -- its mapping: a control page of `page` bytes, then the data
    file  -- major and minor number of the device, and inode, as MMAP2 has them: 16 bytes
    seen  -- pairs of process numbers, of which there are `count`. What has happened is appended:
             (parent, child) of a fork; (0, process) that has mapped the file shared and writable.
             Events for which there is no room are lost
    """
    if ring.shape[0] <= <Py_ssize_t>page or file.shape[0] != 16:
        raise ValueError("this is no perf ring, or no file")
    if seen.shape[0] < 2 or count > <uint64_t>seen.shape[0] // 2:
        raise ValueError(f"{count} pairs in {seen.shape[0]} numbers")
    cdef bint lost
    with nogil:
        lost = xm_drain(
            &ring[0], page, ring.shape[0] - page, &file[0], &seen[0], seen.shape[0] // 2, &count
        )
    return count, lost


if xm_count_forks():
    raise MemoryError("pthread_atfork")


def forks():
    """Return how often this process has forked since this module was imported.

    It counts up before the child is there.
    """
    return xm_forks


def open_own():
    """Open a userfaultfd for the memory of this process. Raises OSError.

    User mode only: that needs no privilege. Writes by the kernel (a read(2) into the memory) are
    recorded all the same, since an asynchronous fault is resolved in the kernel.
    """
    cdef int fd = xm_userfaultfd()
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


def negotiate(int fd):
    """Ask a new userfaultfd for asynchronous write protection of any memory.

    Raises OSError; EINVAL: the kernel is older than 6.7.
    """
    if xm_negotiate(fd):
        raise OSError(errno, os.strerror(errno))


def protect(int fd, uint64_t start, uint64_t length):
    """Start the record for a range of whole mappings. Raises OSError.

    start, length -- bytes, whole pages, in the process that made the userfaultfd
    """
    cdef int failed
    with nogil:
        failed = xm_protect(fd, start, length)
    if failed:
        raise OSError(errno, os.strerror(errno))


def collect(
    int pagemap, uint64_t start, uint64_t end, uint64_t offset, uint64_t page_size,
    uint8_t[::1] bits not None, uint64_t pages, uint64_t lead=0,
):
    """Add the pages written in a range to a bitmap, and protect them again.

    pagemap    -- an open /proc/PID/pagemap
    start, end -- the range: addresses in that process; memory that is not mapped is passed over
    offset     -- where the range begins in the guest, in bytes
    page_size  -- of the guest, in bytes; a page is dirty if any part of it was written
    bits       -- a bitmap of `pages` pages, as in PageSet; what lies past its end is left out
    lead       -- how much of the range lies before `offset`, in bytes: a buffer need not begin with
                  a page of the processor

    Raises OSError; EPERM: part of the range is not recorded, because another mapping has taken its
    place.
    """
    cdef xm_region[REGIONS] regions
    cdef uint64_t at = start, walked = start, low, high, first, last
    cdef uint64_t begin = start + lead
    cdef int found = 0, i
    if <uint64_t>bits.shape[0] * 8 < pages:
        raise ValueError(f"{bits.shape[0]} bytes of bits for {pages} pages")
    with nogil:
        while at < end:
            found = xm_collect(pagemap, True, at, end, regions, REGIONS, &walked)
            if found < 0:
                break
            for i in range(found):
                low, high = regions[i].start, regions[i].end
                if high <= begin:
                    continue
                if low < begin:
                    low = begin
                first = (offset + (low - begin)) // page_size
                last = (offset + (high - begin) - 1) // page_size
                if first < pages:
                    set_range(&bits[0], first, last + 1 if last < pages else pages)
            at = walked
    if found < 0:
        raise OSError(errno, os.strerror(errno))


def walk(int pagemap, uint64_t start, uint64_t end):
    """Look at the pages of a range as `collect` does, to no purpose but to see how long it takes.

    Nothing is protected, and nothing need be. Raises OSError.
    """
    cdef xm_region[REGIONS] regions
    cdef uint64_t at = start, walked = start
    cdef int found = 0
    with nogil:
        while at < end and found >= 0:
            found = xm_collect(pagemap, False, at, end, regions, REGIONS, &walked)
            at = walked
    if found < 0:
        raise OSError(errno, os.strerror(errno))


def address_of(const uint8_t[::1] memory not None):
    """Return the address of a buffer in this process."""
    return <uint64_t>&memory[0]

"""Anonymous memory, which the operating system gives page by page as it is written."""

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/mman.h>
    extern void *mremap(void *, size_t, size_t, int, ...);
    #ifndef MREMAP_MAYMOVE
    #define MREMAP_MAYMOVE 1
    #endif
    #define xb_map(size) \
        mmap(NULL, (size), PROT_READ | PROT_WRITE, \
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    #define xb_map_failed(p) ((p) == MAP_FAILED)
    """
    enum:
        MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MREMAP_MAYMOVE
    void* xb_map(size_t) nogil
    bint xb_map_failed(void*) nogil
    int madvise(void*, size_t, int) nogil
    int munmap(void*, size_t) nogil
    void* mremap(void*, size_t, size_t, int) nogil

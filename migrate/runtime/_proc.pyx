# cython: language_level=3
"""Walks over folders of /proc without the GIL: processes, and the open files of one process.

A process of any user may have hundreds of thousands of open files, and a look at each takes a
system call. A loop in Python takes four times as long as the calls.

What is asked of an open file is its type, device and inode alone, and of the kernel's memory
(AT_STATX_DONT_SYNC): a file server, or a program that serves a FUSE file system, is not asked,
and so cannot make us wait.
"""

from libc.errno cimport EACCES, errno

cdef extern from *:
    """
    #include <dirent.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <stdlib.h>
    #include <sys/stat.h>
    #include <sys/sysmacros.h>
    #include <time.h>
    #include <unistd.h>

    /* Whether a descriptor leads to a file, or to a block device with the number `device`.
       -1: this process may not look. A file system that denies it (FUSE, to other users) shows the
       link all the same; such a file is not one that we have open. */
    static int xm_leads_to(int table, const char *name, int block,
                           unsigned long long device, unsigned long long inode)
    {
    #ifdef STATX_INO
        struct statx there;
        if (!statx(table, name, AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &there)) {
            if (block)
                return S_ISBLK(there.stx_mode)
                    && makedev(there.stx_rdev_major, there.stx_rdev_minor) == device;
            return there.stx_ino == inode
                && makedev(there.stx_dev_major, there.stx_dev_minor) == device;
        }
        if (errno == EACCES) {
            char link;
            return readlinkat(table, name, &link, 1) < 0 && errno == EACCES ? -1 : 0;
        }
        if (errno != ENOSYS)
            return 0;
    #endif
        struct stat here;
        if (fstatat(table, name, &here, 0))
            return errno == EACCES ? -1 : 0;
        if (block)
            return S_ISBLK(here.st_mode) && here.st_rdev == device;
        return here.st_ino == inode && here.st_dev == device;
    }

    static int xm_writable(int table, const char *name)
    {
        struct stat link;
        return !fstatat(table, name, &link, AT_SYMLINK_NOFOLLOW) && link.st_mode & S_IWUSR;
    }

    static double xm_thread_seconds(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
        return now.tv_sec + now.tv_nsec / 1e9;
    }
    """
    ctypedef struct DIR:
        pass
    cdef struct dirent:
        char* d_name
    cdef struct stat "stat":
        unsigned long long st_ino
        unsigned int st_uid
    DIR* fdopendir(int) nogil
    dirent* readdir(DIR*) nogil
    int closedir(DIR*) nogil
    int fstatat(int, const char*, stat*, int) nogil
    int dup(int) nogil
    int close(int) nogil
    int atoi(const char*) nogil
    int AT_SYMLINK_NOFOLLOW
    int xm_leads_to(int, const char*, int, unsigned long long, unsigned long long) nogil
    int xm_writable(int, const char*) nogil
    double xm_thread_seconds() nogil

cdef enum:
    # More descriptors of one file than any program needs that locks or writes it.
    MAX_FOUND = 256
    # How many files are looked at between two looks at the clock.
    STRIDE = 64


cdef DIR* opened(int table) except NULL:
    """Open a folder once more, to be read from its beginning. Raises OSError."""
    cdef int own = dup(table)
    if own < 0:
        raise OSError(errno, "dup")
    cdef DIR* folder = fdopendir(own)
    if folder == NULL:
        close(own)
        raise OSError(errno, "fdopendir")
    return folder


def find_descriptors(
    int table, unsigned long long device, unsigned long long inode, *,
    bint block=False, bint writable=False, double deadline=float("inf"),
):
    """Find the descriptors of a process that lead to one file.

    table    -- an open folder of /proc like /proc/PID/fd, not read yet
    device, inode -- of the file; of a block device, the number that it is (st_rdev) and 0
    block    -- a block device is looked for
    writable -- only descriptors that were opened for writing
    deadline -- processor time of this thread (time.thread_time) at which to end

    Returns their numbers, at most 256, and whether all of the folder was looked at. Raises OSError,
    PermissionError where this process may not look into that one.
    """
    cdef DIR* folder = opened(table)
    cdef int[MAX_FOUND] found
    cdef int count = 0, looked = 0, leads
    cdef bint complete = True, denied = False
    cdef dirent* entry
    with nogil:
        while True:
            entry = readdir(folder)
            if entry == NULL:
                break
            if entry.d_name[0] == c".":
                continue
            looked += 1
            if count == MAX_FOUND or (looked % STRIDE == 0 and xm_thread_seconds() >= deadline):
                complete = False
                break
            leads = xm_leads_to(table, entry.d_name, block, device, inode)
            if leads < 0:
                denied = True
                break
            if not leads:
                continue
            if not writable or xm_writable(table, entry.d_name):
                found[count] = atoi(entry.d_name)
                count += 1
        closedir(folder)
    if denied:
        raise PermissionError(EACCES, "the open files of the process may not be looked at")
    return [found[index] for index in range(count)], complete


def leads_to(int table, int fd, unsigned long long device, unsigned long long inode):
    """Return whether one descriptor of a process leads to a file; False if it cannot be seen.

    table, device, inode -- as in find_descriptors
    """
    cdef bytes name = b"%d" % fd
    cdef const char* text = name
    cdef int leads
    with nogil:
        leads = xm_leads_to(table, text, 0, device, inode)
    return leads > 0


def list_processes(int table):
    """List what an open /proc shows: (PID, inode of /proc/PID, its owner) of each process."""
    cdef DIR* folder = opened(table)
    cdef dirent* entry
    cdef stat here
    cdef int failed
    found = []
    while True:
        with nogil:
            entry = readdir(folder)
            while entry != NULL and not c"0" <= entry.d_name[0] <= c"9":
                entry = readdir(folder)
            failed = entry != NULL and fstatat(table, entry.d_name, &here, AT_SYMLINK_NOFOLLOW)
        if entry == NULL:
            break
        if not failed:
            found.append((atoi(entry.d_name), here.st_ino, here.st_uid))
    closedir(folder)
    return found

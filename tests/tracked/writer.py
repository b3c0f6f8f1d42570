"""A program that writes a file in the way that each line on standard input says.

    python writer.py FILE     maps all of FILE and prints "ready"

    write PAGE            through the mapping
    pwrite PAGE           by the descriptor
    read PAGE             from /dev/urandom into the mapping: the kernel writes
    map, unmap            a second mapping of all of it, or its end
    write2 PAGE           through that one
    brief PAGE            through a mapping that is made and given back
    move                  mremap(2) of the first mapping
    fork PAGE             a child writes the page, and ends
    spawn, child PAGE     a child that waits; it writes the page, and ends
    advise                MADV_DONTNEED of the first mapping

Each is answered with "done".
"""

import ctypes
import mmap
import os
import sys

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.readv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Program:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.first = self.mapped()
        self.second = self.outlet = self.child = 0

    def mapped(self) -> int:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return libc.mmap(None, self.size, access, mmap.MAP_SHARED, self.fd, 0)

    def change(self, address: int, page: int) -> None:
        byte = ctypes.c_ubyte.from_address(address + page * PAGE)
        byte.value = (byte.value + 1) % 256

    def do(self, what: str, page: int) -> None:
        if what == "write":
            self.change(self.first, page)
        elif what == "pwrite":
            old = os.pread(self.fd, 1, page * PAGE)[0]
            os.pwrite(self.fd, bytes([(old + 1) % 256]), page * PAGE)
        elif what == "read":
            vector = Vector(self.first + page * PAGE, 100)
            zeros = os.open("/dev/urandom", os.O_RDONLY)
            assert libc.readv(zeros, ctypes.byref(vector), 1) == 100
            os.close(zeros)
        elif what == "map":
            self.second = self.mapped()
        elif what == "unmap":
            libc.munmap(self.second, self.size)
        elif what == "write2":
            self.change(self.second, page)
        elif what == "brief":
            address = self.mapped()
            self.change(address, page)
            libc.munmap(address, self.size)
        elif what == "move":
            self.first = libc.mremap(self.first, self.size, self.size + (64 << 20), 1)
        elif what == "advise":
            libc.madvise(self.first, self.size, mmap.MADV_DONTNEED)
        else:
            self.do_in_child(what, page)

    def do_in_child(self, what: str, page: int) -> None:
        if what == "fork":
            child = os.fork()
            if not child:
                self.change(self.first, page)
                os._exit(0)
            os.waitpid(child, 0)
        elif what == "spawn":
            inlet, self.outlet = os.pipe()
            self.child = os.fork()
            if not self.child:
                self.change(self.first, int(os.read(inlet, 20)))
                os._exit(0)
        elif what == "child":
            os.write(self.outlet, b"%d" % page)
            os.waitpid(self.child, 0)


program = Program(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    word, _, page = line.strip().partition(" ")
    program.do(word, int(page or 0))
    print("done", flush=True)

"""Runs a command without some system calls, as old kernels and sandboxes do.

    python tests/missing_calls.py ERRNO NUMBER[,NUMBER...] COMMAND...

Each of these calls fails with ERRNO, in the command and in all that it starts.
"""

import ctypes
import os
import platform
import struct
import sys

PIDFD_SEND_SIGNAL, PIDFD_OPEN = 424, 434  # on every architecture
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER = 22, 38, 2
LOAD_NUMBER, EQUALS, RETURN = (0x20, 0, 0, 0), 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x50000
SUPPORTED = platform.machine() in ("x86_64", "aarch64")


def forbid(error: int, numbers: list[int]) -> None:
    """From here on these system calls fail with `error` in this process and its children."""
    program = [LOAD_NUMBER]
    for number in numbers:
        program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ERRNO | error)]
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_SECCOMP, FILTER, ctypes.byref(head))):
        if libc.prctl(*arguments, *(0,) * (5 - len(arguments))):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid(int(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")])
    os.execvp(sys.argv[3], sys.argv[3:])

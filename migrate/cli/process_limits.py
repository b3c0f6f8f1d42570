"""Check the limits of this process before a migration begins, not in the middle of it."""

from __future__ import annotations

import resource
import threading

from migrate.errors import UsageError

# 64 channels, the connections of twice as many strangers at the destination, and what Python opens.
OPEN_FILES = 1024
LEAST_OPEN_FILES = 256
# The threads of a whole migration on two processors, and some to spare.
LEAST_THREADS = 12


def check_open_files() -> None:
    """Raise the limit of open files to OPEN_FILES, as far as the system allows that.

    Raises UsageError below LEAST_OPEN_FILES.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        soft = OPEN_FILES if hard < 0 else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if 0 <= soft < LEAST_OPEN_FILES:
        raise UsageError(
            f"only {soft} files may be open in this process, and {LEAST_OPEN_FILES} may be needed: "
            "raise the limit (ulimit -n)"
        )


def check_threads() -> None:
    """Start as many threads as may be needed, and end them.

    A thread that cannot be started later would end the program in the middle of a migration.
    Raises UsageError.
    """
    over, threads = threading.Event(), []
    try:
        for _ in range(LEAST_THREADS):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        raise UsageError(
            f"only {len(threads)} threads can be started here, and {LEAST_THREADS} may be needed: "
            "raise the limit (ulimit -u, a service's TasksMax, a container's --pids-limit)"
        ) from None
    finally:
        over.set()
        for thread in threads:
            thread.join()

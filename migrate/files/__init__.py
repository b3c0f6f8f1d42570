"""Files and directories that others may own, and the locks and names in them.

directory       opened once; what is done in it happens in it, and to files of ours
  identity      which file a name is expected to lead to
  walk          follows a path through no symbolic link of another user
  trust, trusted_places   what only root and we can change
  removal       removes what we have made
filesystem      files that get their name when they are complete
partial_output  a part of an output that an earlier program left
reservation     of all programs that receive for one name, only one may
socket_file     a unix socket that only its owner may use
lock            of all programs that could move a guest, only one may
  file_lock     the lock on a file, which gives way to the guest's own program
  lock_waiters  whether that waits for it
  kernel_locks  what the kernel shows of locks
openers         which processes have a file open
mounts          what is mounted
"""

"""Finding what was written by the kernel's own record, instead of by reading the guest.

tracker          the dirty set of a guest, and when the record is not to be trusted
record           what a tracker asks of a record
  own_record     of this process's writes to a buffer
  guest_record   of all processes that map a file
    mappings     where a process has it mapped
    process_record  the record of one process
    injector     has a process make a userfaultfd for its memory (_injection: ptrace)
    changes      what the record does not see, noticed by other means
protection       of one process's memory (_kernel: userfaultfd and PAGEMAP_SCAN)
"""

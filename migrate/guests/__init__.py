"""Guests, and the places where they arrive.

guest             what the source moves
place             where it arrives
file              a file or block device that other processes write; file_place where it arrives
  opened_file     opened to read (device: what is special about a block device)
  recorded_file   what the kernel's record of writes asks of it (migrate.tracking)
  rights          mode and owner
  moved_mark      a mark on a file that was given away
  writer_search   finds the processes that can write it (guest_file: by its inode)
  writer_survey   finds them before the migration begins, and refuses what would go on writing
  writer_watch    finds new ones while it goes on
  writer_control  stops and resumes them
  watchdog        throttles them, and resumes them if the source dies (duty_cycle)
  kernel_writers  loop devices, swap and file systems that write it
  companions      files beside it that are not moved, such as a database's log
  proc_view       what of other processes is not shown here
output_file       an output: complete and verified under its name, or not there
buffer            memory of a Python program (write_lock: keeps its writers out of the pause)
demo              the guest of `make demo`
device_lock, buffer_lock   so that no two programs move one guest (files: migrate.files.file_lock)
command           --pause-cmd, --resume-cmd, --on-complete
"""

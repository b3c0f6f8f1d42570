"""QEMU's migration stream: its parts, and the kernels that walk its pages.

stream_parser  cuts a stream into its parts as it arrives
  parts        the parts: sections, lists of blocks, runs of pages, commands
  cursor       reads numbers and names from the bytes that have arrived
_ram_reader    finds the pages in a RAM section
_ram_writer    writes batches of pages as records of a RAM section
_ram_files     writes pages into the files of a snapshot, and reads them back
_ram_survey    counts and searches the pages of a captured stream, for migrate-stream
kernel         chooses the compiled kernels or their twins in plain Python (_..._twin)
"""

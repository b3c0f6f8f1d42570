"""What the programs print. Printing changes neither what they do nor their exit codes.

print, say, tracebacks --text--> Output --bytes--> Outlet --> descriptor

text     make text from others (file names, a peer's words) safe to print
outlet   write to a descriptor without blocking
streams  the standard output and standard error of a program
run      start a program with such streams, and end it
"""

from migrate.output.text import printable, say, show

__all__ = ["printable", "say", "show"]

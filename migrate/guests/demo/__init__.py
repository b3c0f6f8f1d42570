"""The demo guest: a process of ours that writes, and checks, its own memory.

layout   the memory that it shares with source and destination
process  the process itself: counts in that memory
handle   our handle on such a process
guest    a demo guest at the source
place    the place of one at the destination
check    a program that checks a running one
"""

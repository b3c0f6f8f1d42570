"""QEMU's migration stream.

A part is QEMU's: a section, a run of pages (proto.qemu.parts). An item is ours: what is sent,
numbered, and sent again after a break.

intake       reads the parts at the source, and cuts them into items
loader       sends it at the destination to what loads it
place        what a place for a stream is to its receiver
return_path  what the destination says to the source
description  checks sections against QEMU's description of them
"""

"""A QEMU, driven over its control socket (QMP).

    Machine  machine.py  what is wanted of it: prepare, migrate, cancel, let run again, ...
       |
    Client   client.py   commands and their answers, and the events between them
       |     messages.py what QEMU says, text by text
       |
    QEMU -qmp unix:PATH,server=on,wait=off

Nothing here reads a migration stream.
"""

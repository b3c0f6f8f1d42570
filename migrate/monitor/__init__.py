"""What an operator may ask a running program, and set.

    a person   --line-->  human.py --+
                                     +--> node.py  the program: what it shows, takes and does
    a machine  --JSON-->  qmp.py  ---+        |
               commands.py names what there is   settings.py  parameters and capabilities, by name

server.py and terminal.py carry it: sockets, and standard input. Nothing here moves memory.
"""

"""What operators may ask a running program, and set.

    people    --line-->  human.py ---+
                                     +--> monitored.py  the program: what it shows, takes and does
    machines  --JSON-->  qmp.py  ----+         |
                commands.py: QMP's commands    settings.py: parameters and capabilities by name

server.py serves the Unix sockets, terminal.py standard input. Nothing here moves memory.
"""

"""The benchmark: `make bench`, or `python -m tests.bench [PART ...] [--quick]`.

    __main__.py      arguments, and what is written where
    registry.py      the parts, by name: add one there
    report.py        what a part is given (Options) and what it hands back (Part, Table)
    turns.py         A B C A B C ..., and medians
    machine.py       what it ran on
    processes.py     a program's wall time, CPU seconds and peak memory
    guest_files.py   files of guest memory, and room for them
    migration.py     one migration by migrate-src and migrate-dst
    bulk.py, scaling.py, rivals.py and their helpers: the parts
    plots.py         SVG plots, drawn from the numbers that are in bench.json

Nothing here asserts a time. It uses the programs as a user would, by their command lines.
"""

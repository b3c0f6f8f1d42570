"""Captured streams, QEMU's or ours: what migrate-stream reads and how it tells it.

file or pipe --reading.py--> QemuSurvey or FrameSurvey (proto) --facts--> text.py, or JSON
                                  |
                             records of pages --> pages.py    those that were asked for
                                              --> images.py   the memory of a block, in a file
"""

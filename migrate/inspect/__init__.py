"""Read captured streams, of QEMU or of migrate-src, for migrate-stream.

file or pipe --reading.py--> QemuSurvey or FrameSurvey (proto) --facts--> text.py, or JSON
                                 |
                            page records --> pages.py    list some of them, or write a block's
                                                         memory to a file
"""

"""Snapshots: a virtual machine that is saved in a directory, and restored from it.

layout      the files of a snapshot
place       a directory as the place for a guest: files, saving, prepared
guest       a snapshot as a guest to migrate: sending
"""

"""Surveys: what a captured stream holds, QEMU's or ours."""

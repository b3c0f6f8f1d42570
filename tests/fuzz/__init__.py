"""Fuzzing of what bytes from outside reach: `make fuzz` runs it, tests/test_fuzz.py replays."""

"""QEMU's control socket: its messages, a client, and what is asked of a machine."""

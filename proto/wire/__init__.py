"""The wire: frames, messages, the session's states, capabilities and who owns the guest."""

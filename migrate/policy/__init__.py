"""Policy: numbers in, decisions out.

No module here knows clocks, sockets or guests. Only `advice` knows sentences for users.
"""

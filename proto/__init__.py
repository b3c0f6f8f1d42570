"""The bytes of xbmigrate: XBZRLE deltas, the page cache, and the framed page stream.

Sans-I/O: bytes in, messages out. Nothing here knows sockets, time, threads or asyncio, and nothing
imports `migrate`. The specification is README.md in this folder.
"""

from proto.wire.errors import DecodeError, ErrorCode, LocalError, ProtoError, RemoteError

__all__ = ["DecodeError", "ErrorCode", "LocalError", "ProtoError", "RemoteError"]

# Another distribution also installs a package called `proto`; migrate checks this mark.
__wire_name__ = "xbmigrate"

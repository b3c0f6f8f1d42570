"""A TLS 1.3 client in memory that can forge records which OpenSSL does not offer to send."""

from __future__ import annotations

import ssl
import struct
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

APPLICATION_DATA, HANDSHAKE = 23, 22
# RFC 8446, 4.6.3: key_update (24), three bytes of length, update_requested (1)
KEY_UPDATE = bytes.fromhex("18 000001 01")
# The secrets of TLS_AES_256_GCM_SHA384, OpenSSL's first choice.
HASH, KEY_BYTES, IV_BYTES = hashes.SHA384(), 32, 12


def _expand(secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label without a context (RFC 8446, 7.1)."""
    name = b"tls13 " + label.encode()
    info = struct.pack(">HB", length, len(name)) + name + b"\0"
    return HKDFExpand(HASH, length, info).derive(secret)


class TlsClient:
    """The client's end of a connection: bytes in, bytes out, and its traffic secret."""

    def __init__(self, context: ssl.SSLContext, key_log: Path, server: str = "127.0.0.1") -> None:
        context.keylog_filename = str(key_log)
        self._key_log = key_log
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server)

    def shake(self) -> bytes:
        """Go on with the handshake; return what the server is to get."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()

    def key_updates(self, count: int) -> bytes:
        """Return `count` records, each of which asks the server for a KeyUpdate in return.

        Each is the first record under the key that the one before has announced, so its sequence
        number is 0. Nothing may have been sent after the handshake.
        """
        cipher = self.tls.cipher()
        assert cipher is not None
        assert cipher[0] == "TLS_AES_256_GCM_SHA384"
        lines = [line.split() for line in self._key_log.read_text().splitlines()]
        named = {words[0]: words[-1] for words in lines}  # LABEL CLIENT_RANDOM SECRET
        secret = bytes.fromhex(named["CLIENT_TRAFFIC_SECRET_0"])
        inner, records = KEY_UPDATE + bytes([HANDSHAKE]), []
        header = struct.pack(">BHH", APPLICATION_DATA, 0x0303, len(inner) + 16)
        for _ in range(count):
            key, nonce = _expand(secret, "key", KEY_BYTES), _expand(secret, "iv", IV_BYTES)
            records.append(header + AESGCM(key).encrypt(nonce, inner, header))
            secret = _expand(secret, "traffic upd", HASH.digest_size)
        return b"".join(records)

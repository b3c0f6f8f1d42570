"""Credentials for TLS: what this side proves itself with, and how it judges the other side.

The files have QEMU's names, and are all in one directory, so those that were made for
`qemu -object tls-creds-x509` will do:

    ca-cert.pem                          the authority that both sides trust
    server-cert.pem, server-key.pem      migrate-dst proves itself with these
    client-cert.pem, client-key.pem      migrate-src does with these
    ca-crl.pem                           optional: certificates that are revoked

A user who can write one of them decides which peers may connect. So each must be a plain file that
only root and our user can write or replace (migrate.files.directory).

TLS 1.3 and nothing older, from the first byte; both sides prove themselves. There is no STARTTLS:
a stranger on the path cannot strip what is never negotiated. This module knows nothing of
connections: migrate.transport.tls_transport speaks TLS over one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

from migrate.errors import TlsError, UsageError
from migrate.files.trusted_places import open_trusted
from migrate.output import printable
from migrate.transport.address import Address
from migrate.transport.certificate_names import check_dns_name, distinguished_name, has_name
from proto.wire.messages import MAX_TEXT
from proto.wire.ownership import Role

REQUIRE = "MIGRATE_REQUIRE_TLS"
PLAIN = (
    "the guest's memory travels to another host unencrypted, and nobody proves who they are: "
    "see --tls-creds"
)
HOW = 'the README, "Encryption", makes it in one command'

CA, CRL = "ca-cert.pem", "ca-crl.pem"
PARTY = {Role.SOURCE: "client", Role.DESTINATION: "server"}
NAMES = {Role.SOURCE: "the source", Role.DESTINATION: "the destination"}
# Permissions of group and others: a key should have none of them.
OTHERS = 0o077


class Credentials:
    """The identity of one side, and the rules by which it judges the other.

    directory -- holds the files
    role      -- of this side
    authz     -- names of the clients that may bring a guest, as in certificate_names; empty: every
                 client with a valid certificate may
    hostname  -- the name that the server's certificate must have; "": that of its address

    Raise TlsError, naming the file, if one is missing or not what it should be; UsageError for a
    name that no certificate can have.
    """

    def __init__(
        self, directory: str, role: Role, *, authz: Iterable[str] = (), hostname: str = ""
    ) -> None:
        self.role = role
        self.authz = frozenset(authz)
        for name in self.authz:
            check_dns_name(name)
        self.hostname = hostname
        self.notices: list[str] = []
        """Sentences for the user, on what works and should be changed all the same."""
        self._directory = Path(directory)
        server = role is Role.DESTINATION
        self.context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        )
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_REQUIRED
        if server:
            # A ticket tells the client that it is accepted (migrate.transport.tls_transport).
            self.context.num_tickets = 1
        self._load()

    @property
    def certificate(self) -> str:
        """The name of the file with our certificate."""
        return f"{PARTY[self.role]}-cert.pem"

    def _load(self) -> None:
        with contextlib.ExitStack() as files:
            authority, crl = self._file(CA, files), self._file(CRL, files, optional=True)
            try:
                self.context.load_verify_locations(_path_of(authority))
            except (ssl.SSLError, OSError) as error:
                why = f"holds no certificate that can be read: {error}"
                raise TlsError(f"{self._directory / CA} {why}") from None
            if crl is not None:
                try:
                    self.context.load_verify_locations(_path_of(crl))
                except (ssl.SSLError, OSError) as error:
                    why = f"is no list of revoked certificates: {error}"
                    raise TlsError(f"{self._directory / CRL} {why}") from None
                self.context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
            self._load_ours(files)

    def _load_ours(self, files: contextlib.ExitStack) -> None:
        key_name = f"{PARTY[self.role]}-key.pem"
        certificate, key = self._file(self.certificate, files), self._file(key_name, files)
        both = f"{self._directory / self.certificate} and {self._directory / key_name}"
        if os.fstat(key).st_mode & OTHERS:
            path = self._directory / key_name
            self.notices.append(f"{path} can be read by others than its owner: chmod 600 {path}")
        try:
            self.context.load_cert_chain(
                _path_of(certificate), _path_of(key), password=_no_password
            )
        except ssl.SSLError as error:
            why = f"they cannot be read: {error}"
            if error.reason == "KEY_VALUES_MISMATCH":
                why = "the key is not that of the certificate"
            raise TlsError(f"{both}: {why}") from None
        except OSError as error:
            raise TlsError(f"{both}: {error.strerror or error}") from None

    @overload
    def _file(self, name: str, files: contextlib.ExitStack) -> int: ...

    @overload
    def _file(self, name: str, files: contextlib.ExitStack, *, optional: bool) -> int | None: ...

    def _file(
        self, name: str, files: contextlib.ExitStack, *, optional: bool = False
    ) -> int | None:
        """Open one of the files; return its descriptor, which `files` closes.

        Return None if an optional file is not there. Raise TlsError.
        """
        path = self._directory / name
        try:
            fd = open_trusted(str(path))
        except FileNotFoundError:
            if optional:
                return None
            raise TlsError(f"there is no {path}: {HOW}") from None
        except OSError as error:
            raise TlsError(f"{path} cannot be read: {error.strerror}") from None
        files.callback(os.close, fd)
        return fd

    def name_of(self, address: Address) -> str:
        """Return the name that the certificate of the server at this address must have."""
        return self.hostname or address.host or "localhost"

    def denial(self, certificate: dict[str, Any]) -> str:
        """Return why the holder of a valid certificate may not connect; "" if it may.

        certificate -- as ssl's `getpeercert` gives it
        """
        if not self.authz:
            return ""
        parts = itertools.chain.from_iterable(certificate.get("subject", ()))
        if not all(isinstance(value, str) for _, value in parts):
            return "its certificate has a name that is no text"
        if any(has_name(certificate, name) for name in self.authz):
            return ""
        name = printable(distinguished_name(certificate), MAX_TEXT // 2)
        return f"{name or 'who has no name'} is none of those who may (--tls-authz)"

    def fault(self, error: ssl.SSLError, name: str = "") -> TlsError:
        """Return what an error of the handshake means, in one sentence.

        name -- that the server's certificate should have
        """
        other = NAMES[self.role.peer]
        reason = error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            why = _verdict(error, name, PARTY[self.role.peer])
            return TlsError(f"the certificate of {other} is refused: {why}")
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return TlsError(
                f"{other} gave no certificate: it needs {PARTY[self.role.peer]}-cert.pem"
            )
        if reason in NO_COMMON_VERSION:
            return TlsError(f"{other} does not speak TLS 1.3, and nothing older is spoken here")
        for alert, why in ALERTS.items():
            if reason.endswith(alert):
                text = why.format(ours=self._directory / self.certificate)
                return TlsError(f"{other} refused {text}")
        return TlsError(f"TLS with {other} failed: {error.reason or error}")


def _path_of(fd: int) -> str:
    """Return a path for OpenSSL, which takes no descriptors, to the very file that was checked."""
    return f"/proc/self/fd/{fd}"


def _no_password() -> str:
    raise TlsError("the key is encrypted, and nobody is here to be asked for its password")


def no_tls(role: Role) -> TlsError:
    """Return the error of a side that speaks TLS, and whose peer does not.

    role -- of this side
    """
    other = NAMES[role.peer]
    return TlsError(f"{other} speaks no TLS, and this side does: give --tls-creds to both, or none")


def tls_there(role: Role) -> TlsError:
    """Return the error of a side that speaks no TLS, and whose peer does.

    role -- of this side
    """
    return TlsError(f"{NAMES[role.peer]} speaks TLS, and this side does not: give it --tls-creds")


# The ends of OpenSSL's names for the alerts of RFC 8446, 6.2, and what the peer says of us by them.
# OpenSSL sends "bad certificate" in two cases, and does not say in which.
ALERTS = {
    "ALERT_CERTIFICATE_EXPIRED": "{ours}: expired",
    "ALERT_CERTIFICATE_REVOKED": "{ours}: revoked",
    "ALERT_UNKNOWN_CA": "{ours}: the authority that signed it is not the one in its ca-cert.pem",
    "ALERT_DECRYPT_ERROR": "{ours}: the authority that signed it is not the one in its ca-cert.pem",
    "ALERT_UNSUPPORTED_CERTIFICATE": "{ours}: made for another purpose (extended key usage)",
    "ALERT_BAD_CERTIFICATE": "{ours}: not valid yet, or not for the host name it was asked under",
    "ALERT_CERTIFICATE_UNKNOWN": "{ours}, and does not say why",
    "ALERT_CERTIFICATE_REQUIRED": "to go on without a certificate",
    "ALERT_ACCESS_DENIED": "to let this address in (--allow)",
    "ALERT_PROTOCOL_VERSION": "TLS 1.3",
}


def is_verdict(error: ssl.SSLError) -> bool:
    """Return whether the peer says that it does not trust us; else the connection is at fault."""
    return any((error.reason or "").endswith(alert) for alert in ALERTS)


NO_COMMON_VERSION = (
    "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "VERSION_TOO_LOW", "WRONG_SSL_VERSION",
)  # fmt: skip

# X509_V_ERR_* of OpenSSL's x509_vfy.h
UNKNOWN_CA = {2, 7, 18, 19, 20, 21, 24, 27, 29, 30}
NOT_YET_VALID, EXPIRED, REVOKED, PURPOSE = 9, 10, 23, 26
WRONG_NAME = {62, 64}
CRL_FAULTS = {3: "there is none of its authority", 11: "it is not valid yet", 12: "it has expired"}


def _verdict(error: ssl.SSLCertVerificationError, name: str, party: str) -> str:
    """Return why OpenSSL refuses the peer's certificate.

    name  -- that it should have
    party -- what it should be made for: client or server
    """
    code = error.verify_code
    if code in UNKNOWN_CA:
        return f"the authority that signed it is not the one in our {CA}"
    if code in WRONG_NAME:
        return f"it is not for {name}: connect by a name it has, or give that as --tls-hostname"
    if code in CRL_FAULTS:
        return f"our {CRL} cannot tell whether it is revoked: {CRL_FAULTS[code]}"
    return {
        NOT_YET_VALID: "it is not valid yet (or the clock here is wrong)",
        EXPIRED: "it has expired (or the clock here is wrong)",
        REVOKED: f"it was revoked: it is in our {CRL}",
        PURPOSE: f"it is not made for a {party} (extended key usage)",
    }.get(code, error.verify_message)


def required() -> bool:
    """Return whether MIGRATE_REQUIRE_TLS forbids plain TCP to another host.

    Raise UsageError for a value that is neither yes nor no.
    """
    value = os.environ.get(REQUIRE, "").lower()
    if value in ("1", "on", "yes", "true"):
        return True
    if value in ("", "0", "off", "no", "false"):
        return False
    raise UsageError(f"{REQUIRE}={value!r}: it is 1 or 0")


def plain_refused() -> TlsError:
    """Return the error of plain TCP to another host where that is forbidden."""
    return TlsError(f"plain TCP to another host, and {REQUIRE} is set: give --tls-creds")

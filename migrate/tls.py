"""Who the peer is: certificates, what is wrong with one, and who may connect.

The files have QEMU's names, all in one directory, so that those of `qemu -object tls-creds-x509`
will do:

    ca-cert.pem                          the authority that both sides trust
    server-cert.pem, server-key.pem      migrate-dst proves itself with these
    client-cert.pem, client-key.pem      migrate-src does with these
    ca-crl.pem                           optional: certificates that are no longer good

Whoever can write one of them decides who is let in. So each must be a plain file that nobody but
root and us can write or replace (see migrate.directory).

TLS 1.3 and nothing older, from the first byte; both sides prove themselves. This module knows
nothing of connections: migrate.secure speaks TLS over one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from migrate.address import Address, ip_of
from migrate.directory import open_trusted
from migrate.errors import TlsError, UsageError
from migrate.output import printable
from proto.messages import MAX_TEXT
from proto.ownership import Role

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

REQUIRE = "MIGRATE_REQUIRE_TLS"
PLAIN = (
    "the guest's memory travels to another host unencrypted, and nobody proves who they are: "
    "see --tls-creds"
)
HOW = 'the README, "Encryption", makes it in one command'

CA, CRL = "ca-cert.pem", "ca-crl.pem"
PARTY = {Role.SOURCE: "client", Role.DESTINATION: "server"}
NAMES = {Role.SOURCE: "the source", Role.DESTINATION: "the destination"}
# Everybody but its owner: a key that the group or others may read.
OTHERS = 0o077
# RFC 4291, 2.5.5.2: ::ffff:0:0/96
MAPPED_BITS = 96
# RFC 4514, section 3
SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}


class Credentials:
    """What one side proves itself with, and how it looks at the other.

    directory -- holds the files
    role      -- whose side this is
    authz     -- the clients that may bring a guest: `node1` is a common name, `DNS:node1` a DNS
                 name, what has a = in it a distinguished name (RFC 4514); none: everybody with a
                 certificate
    hostname  -- the name that the server's certificate must have; "": that of its address

    Raises TlsError, naming the file, where one is missing or not what it should be.
    """

    def __init__(
        self, directory: str, role: Role, *, authz: Iterable[str] = (), hostname: str = ""
    ) -> None:
        self.role = role
        self.authz = frozenset(authz)
        self.hostname = hostname
        self.notices: list[str] = []
        """What is not wrong, but should be known: sentences."""
        self._directory = Path(directory)
        server = role is Role.DESTINATION
        self.context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        )
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_REQUIRED
        if server:
            self.context.num_tickets = 1  # it says that the client is accepted (migrate.secure)
        self._load()

    @property
    def certificate(self) -> str:
        """The name of our certificate's file."""
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
        """A descriptor, which `files` closes; None where an optional file is not there."""
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
        """The name that the certificate at this address must have."""
        return self.hostname or address.host or "localhost"

    def denial(self, certificate: dict[str, Any]) -> str:
        """Why the holder of this certificate (as `getpeercert` gives it) may not connect, or ""."""
        if not self.authz:
            return ""
        parts = itertools.chain.from_iterable(certificate.get("subject", ()))
        if not all(isinstance(value, str) for _, value in parts):
            return "its certificate has a name that is no text"
        if any(_is_of(name, certificate) for name in self.authz):
            return ""
        name = printable(distinguished_name(certificate), MAX_TEXT // 2)
        return f"{name or 'who has no name'} is none of those who may (--tls-authz)"

    def fault(self, error: ssl.SSLError, name: str = "") -> TlsError:
        """What an error of a handshake means, in one sentence.

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
    """A path for OpenSSL, which takes no descriptors: that of the file that was checked."""
    return f"/proc/self/fd/{fd}"


def _no_password() -> str:
    raise TlsError("the key is encrypted, and nobody is here to be asked for its password")


def no_tls(role: Role) -> TlsError:
    """The side `role` speaks TLS, and its peer does not."""
    other = NAMES[role.peer]
    return TlsError(f"{other} speaks no TLS, and this side does: give --tls-creds to both, or none")


def tls_there(role: Role) -> TlsError:
    """The peer of the side `role` speaks TLS, and this side does not."""
    return TlsError(f"{NAMES[role.peer]} speaks TLS, and this side does not: give it --tls-creds")


# The ends of OpenSSL's names for the alerts of RFC 8446, 6.2: what the peer says of us. Of
# "bad certificate" it says no more; OpenSSL means by it the two below.
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
    """Whether the peer says by it that it does not trust us; else the connection is at fault."""
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


# ---------------------------------------------------------------- names

DNS = "DNS:"


def distinguished_name(certificate: dict[str, Any]) -> str:
    """The subject, as RFC 4514 writes it: the last part first, as QEMU's tls-authz has it."""
    parts = [
        "+".join(f"{SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in part)
        for part in reversed(certificate.get("subject", ()))
    ]
    return ",".join(parts)


def _escaped(value: str) -> str:
    """RFC 4514, 2.4; what cannot be printed too, as its UTF-8 bytes in hexadecimal."""
    text = ""
    for at, char in enumerate(value):
        edge = (char in " #" and at == 0) or (char == " " and at == len(value) - 1)
        if edge or char in '"+,;<>\\':
            text += f"\\{char}"
        elif char.isprintable():
            text += char
        else:
            text += "".join(f"\\{byte:02X}" for byte in char.encode())
    return text


def _same_host(one: str, other: str) -> bool:
    """DNS folds ASCII alone (RFC 4343): to Python the Kelvin sign in lower case is a k."""
    return one.isascii() and other.isascii() and one.lower() == other.lower()


def _is_of(name: str, certificate: dict[str, Any]) -> bool:
    """Whether it is a certificate's name. What kind of a name it is can be seen from how it is
    written, and it is compared with those alone: a common name may be any text."""
    if name.startswith(DNS):
        wanted = name.removeprefix(DNS)
        names = (value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
        return any(_same_host(wanted, one) for one in names)
    if "=" in name:
        return name == distinguished_name(certificate)
    parts = itertools.chain.from_iterable(certificate.get("subject", ()))
    return any(kind == "commonName" and value == name for kind, value in parts)


# ---------------------------------------------------------------- addresses


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Reads --allow ADDRESS[/BITS]. Raises UsageError."""
    result = []
    for text in texts:
        try:
            result.append(_unmapped(ipaddress.ip_network(text)))
        except ValueError as error:
            raise UsageError(f"--allow {text!r}: {error}: write ADDRESS or ADDRESS/BITS") from None
    return tuple(result)


def _unmapped(network: Network) -> Network:
    """IPv4 that is written as IPv6 (::ffff:10.0.0.0/104) is IPv4: so are peers looked at."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - MAPPED_BITS))
    return network


def allowed(peer: Any, allow: Sequence[Network]) -> bool:
    """Whether who has this name (as `getpeername` gives it) may connect; local processes may."""
    return not allow or not isinstance(peer, tuple) or any(ip_of(peer[0]) in one for one in allow)


def another_host(near: Any, far: Any) -> bool:
    """Whether a connection between these names (as `getsockname` gives them) leaves this host."""
    if not isinstance(near, tuple) or not isinstance(far, tuple):
        return False
    return not ip_of(far[0]).is_loopback and ip_of(near[0]) != ip_of(far[0])


def only_local(sockets: Iterable[socket.socket]) -> bool:
    """Whether nobody on another host can connect to these."""
    return all(
        one.family not in (socket.AF_INET, socket.AF_INET6)
        or ip_of(one.getsockname()[0]).is_loopback
        for one in sockets
    )


def required() -> bool:
    """Whether plain TCP to another host is an error. Raises UsageError for neither yes nor no."""
    value = os.environ.get(REQUIRE, "").lower()
    if value in ("1", "on", "yes", "true"):
        return True
    if value in ("", "0", "off", "no", "false"):
        return False
    raise UsageError(f"{REQUIRE}={value!r}: it is 1 or 0")


def plain_refused() -> TlsError:
    return TlsError(f"plain TCP to another host, and {REQUIRE} is set: give --tls-creds")

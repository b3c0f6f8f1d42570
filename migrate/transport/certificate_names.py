"""The names in a certificate, and whether --tls-authz means one of them.

    CN=node1,O=Ours     a distinguished name, as RFC 4514 writes it: has a =
    DNS:node1.example   a DNS name of the subjectAltName
    node1               a common name

What kind of name an operator means is seen from how it is written, and it is compared with names of
that kind alone. Authorities put any text into a common name: if a common name of "DNS:boss" passed
for a DNS name, the holder of a certificate for the former could pass for the latter.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Any

from migrate.errors import UsageError
from migrate.output import printable

DNS = "DNS:"
# RFC 1035, 2.3.4, without the length bytes
MAX_DNS_NAME = 253
# Separators of the labels of a name (RFC 3490, 3.1), beside the full stop.
DOTS = re.compile("[\u3002\uff0e\uff61]")
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


def distinguished_name(certificate: dict[str, Any]) -> str:
    """Return the subject as RFC 4514 writes it: the last part first, as in QEMU's tls-authz."""
    parts = [
        "+".join(f"{SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in part)
        for part in reversed(certificate.get("subject", ()))
    ]
    return ",".join(parts)


def _escaped(value: str) -> str:
    """Escape a value (RFC 4514, 2.4); what cannot be printed too, as UTF-8 bytes in hexadecimal."""
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


def has_name(certificate: dict[str, Any], name: str) -> bool:
    """Return whether `name`, of --tls-authz, is one of the certificate's."""
    if name.startswith(DNS):
        wanted = name.removeprefix(DNS)
        names = (value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
        return any(_same_host(wanted, one) for one in names)
    if "=" in name:
        return name == distinguished_name(certificate)
    parts = itertools.chain.from_iterable(certificate.get("subject", ()))
    return any(kind == "commonName" and value == name for kind, value in parts)


def _same_host(one: str, other: str) -> bool:
    """DNS folds ASCII alone (RFC 4343); Python's lower() makes a k of the Kelvin sign."""
    return one.isascii() and other.isascii() and one.lower() == other.lower()


def check_dns_name(name: str) -> None:
    """Raise UsageError for a DNS name that is not ASCII: certificates have those alone.

    The error says what to write. The name is not translated for the user: the rules of 2003, which
    Python has, make another host of some names (of "fa\u00df" "fass").
    """
    if not name.startswith(DNS) or name.isascii():
        return
    labels = DOTS.sub(".", unicodedata.normalize("NFC", name.removeprefix(DNS)).lower()).split(".")
    try:
        ascii_form = ".".join(
            one if one.isascii() else f"xn--{one.encode('punycode').decode()}" for one in labels
        )
        write = f": write {DNS}{ascii_form}" if len(ascii_form) <= MAX_DNS_NAME else ""
        "".join(labels).encode()
    except UnicodeError:
        write = ""
    raise UsageError(
        f"--tls-authz {printable(name)}: certificates have DNS names in ASCII alone{write}"
    )

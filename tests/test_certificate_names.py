"""Names in certificates, as operators and standards write them."""

from __future__ import annotations

import pytest

from migrate.errors import UsageError
from migrate.transport.certificate_names import check_dns_name, distinguished_name, has_name
from tests.authority import name_of


@pytest.mark.parametrize("crafted", ["CN=boss,O=Acme", "DNS:boss", "boss,O=Acme"])
def test_name_kinds_do_not_match_each_other(crafted: str) -> None:
    """Authorities put any text into a common name."""
    certificate = {
        "subject": ((("organizationName", "Visitors"),), (("commonName", crafted),)),
        "subjectAltName": (("DNS", crafted), ("IP Address", "boss"), ("email", "boss")),
    }
    for name in ("CN=boss,O=Acme", "DNS:boss", "boss", f"CN={crafted}", f"DNS:{crafted}x"):
        assert not has_name(certificate, name)
    assert has_name(certificate, distinguished_name(certificate))
    assert has_name(certificate, f"DNS:{crafted}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Kiosk.example", "kiosk.EXAMPLE", True), ("kiosk", "\u212aiosk", False),
        ("\u212aiosk", "kiosk", False), ("b\xfccher", "b\xfccher", False),
    ],
)  # fmt: skip
def test_dns_names_are_compared_as_ascii(one: str, other: str, same: bool) -> None:
    assert has_name({"subjectAltName": (("DNS", other),)}, f"DNS:{one}") == same


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("b\xfccher.example", ": write DNS:xn--bcher-kva.example"),
        ("B\xdcCHER.Example", ": write DNS:xn--bcher-kva.example"),
        ("bu\u0308cher.example", ": write DNS:xn--bcher-kva.example"),
        ("*.b\xfccher\u3002example", ": write DNS:*.xn--bcher-kva.example"),
        ("fa\xdf.example", ": write DNS:xn--fa-hia.example"),  # and not fass
        ("\udcff.example", ""), ("\xfc" * 300, ""),
    ],
)  # fmt: skip
def test_non_ascii_dns_name_is_refused_with_its_ascii_form(name: str, write: str) -> None:
    """Such a name would match no certificate."""
    with pytest.raises(UsageError) as found:
        check_dns_name(f"DNS:{name}")
    said = str(found.value)
    assert said.startswith("--tls-authz DNS:")
    assert said.endswith(f"certificates have DNS names in ASCII alone{write}")
    for fine in ("b\xfccher", "DNS:xn--bcher-kva.example"):
        check_dns_name(fine)


def test_distinguished_name_follows_rfc_4514() -> None:
    def name(*pairs: tuple[str, str]) -> str:
        return distinguished_name({"subject": tuple((pair,) for pair in pairs)})

    assert name(("countryName", "DE"), ("commonName", "a")) == "CN=a,C=DE"
    assert name(("commonName", ' #a+b"\\ ')) == 'CN=\\ #a\\+b\\"\\\\\\ '
    assert name(("commonName", "#1")) == "CN=\\#1"
    assert name(("commonName", "a\nb")) == "CN=a\\0Ab"
    assert distinguished_name({}) == ""
    two = {"subject": ((("commonName", "a"), ("userId", "u")),)}
    assert distinguished_name(two) == "CN=a+UID=u"
    assert name_of("a", "o").rfc4514_string() == "CN=a,O=o"

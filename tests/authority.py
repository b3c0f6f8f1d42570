"""An authority of our own, for certificates that are good, or bad in one way."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

PURPOSES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
DAY = datetime.timedelta(days=1)


def name_of(common: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


class Authority:
    """Signs certificates, writes them under QEMU's names, and revokes them."""

    def __init__(self, name: str = "authority") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = name_of(name)
        now = datetime.datetime.now(datetime.UTC)
        key_usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        self.certificate = (
            x509.CertificateBuilder(self.name, self.name, self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 1000 * DAY)
            .not_valid_after(now + 1000 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(key_usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )

    def trust(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        (directory / "ca-cert.pem").write_bytes(pem)

    def issue(
        self, directory: Path, party: str, *, purpose: str = "", host: str = "127.0.0.1",
        organization: str = "", begins: float = -1, ends: float = 1, alternative: bytes = b"",
    ) -> x509.Certificate:  # fmt: skip
        """Writes PARTY-cert.pem and PARTY-key.pem; `begins` and `ends` in days from now.

        alternative -- a DNS name as it stands in the certificate, instead of `host`
        """
        directory.mkdir(exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        names: x509.ExtensionType = x509.SubjectAlternativeName([name])
        if alternative:
            part = b"\x82" + bytes([len(alternative)]) + alternative
            names = x509.UnrecognizedExtension(
                ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30" + bytes([len(part)]) + part
            )
        usage = x509.ExtendedKeyUsage([PURPOSES[purpose or party]])
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            x509.CertificateBuilder(self.name, name_of(party, organization), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins * DAY)
            .not_valid_after(now + ends * DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(names, critical=False)
            .add_extension(ours, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        (directory / f"{party}-cert.pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
        path = directory / f"{party}-key.pem"
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )  # fmt: skip
        return certificate

    def revoke(self, directory: Path, *certificates: x509.Certificate, ends: float = 1) -> None:
        """Writes ca-crl.pem."""
        now = datetime.datetime.now(datetime.UTC)
        crl = x509.CertificateRevocationListBuilder(self.name, now - 2 * DAY, now + ends * DAY)
        for one in certificates:
            crl = crl.add_revoked_certificate(
                x509.RevokedCertificateBuilder(one.serial_number, now - DAY).build()
            )
        pem = crl.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (directory / "ca-crl.pem").write_bytes(pem)

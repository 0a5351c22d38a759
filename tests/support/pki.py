"""Certificates as a mesh has them, by the `cryptography` package: independent of the library under test.

    root = Authority()
    one = root.issue("spiffe://cluster.local/ns/default/sa/web")
    one.key, one.chain          DER, as a CERTIFICATE blob has them
    one.pem(folder)             a file for Python's ssl, openssl s_client, Envoy
"""
from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
SPIFFE = "spiffe://cluster.local/ns/default/sa/"


@dataclass(frozen=True)
class Issued:
    private: ec.EllipticCurvePrivateKey
    certificates: tuple[x509.Certificate, ...]  # leaf first

    @property
    def key(self) -> bytes:
        return self.private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    @property
    def chain(self) -> list[bytes]:
        return [one.public_bytes(serialization.Encoding.DER) for one in self.certificates]

    def pem(self, folder: Path) -> str:
        """A file with the key and the chain; its path."""
        path = folder / f"{self.certificates[0].serial_number:x}.pem"
        path.write_bytes(
            self.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in self.certificates))
        return str(path)


class Authority:
    """A root, and with `above` an intermediate that the root signed."""

    def __init__(self, name: str = "root", above: Authority | None = None) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
        self.above = above
        signer = above or self
        self.certificate = (
            _builder(self.name, signer.name, self.private.public_key(), days=(-1, 365))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .sign(signer.private, hashes.SHA256()))

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def pem(self, folder: Path) -> str:
        path = folder / f"{self.certificate.serial_number:x}.root.pem"
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)

    def issue(self, *names: str, days: tuple[float, float] = (-1, 1), usages: Iterable[ObjectIdentifier] | None = BOTH,
              dns: tuple[str, ...] = (), addresses: tuple[str, ...] = (), subject: tuple[str, str] | None = None) -> Issued:
        """A leaf with these URIs in its SAN, valid from days[0] to days[1] counted from now. `subject`: common name and organization."""
        private = ec.generate_private_key(ec.SECP256R1())
        who = zip((NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME), subject or (), strict=False)
        builder = _builder(x509.Name([x509.NameAttribute(*one) for one in who]), self.name, private.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        sans = [*map(x509.UniformResourceIdentifier, names), *map(x509.DNSName, dns),
                *(x509.IPAddress(ip_address(one)) for one in addresses)]
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=True)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        leaf = builder.sign(self.private, hashes.SHA256())
        return Issued(private, (leaf, self.certificate) if self.above else (leaf,))

    def revoke(self, *issued: Issued, days: tuple[float, float] = (-1, 1)) -> bytes:
        """A revocation list, DER."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (x509.CertificateRevocationListBuilder().issuer_name(self.name).last_update(now + datetime.timedelta(days[0]))
                   .next_update(now + datetime.timedelta(days[1])))
        for one in issued:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(one.certificates[0].serial_number).revocation_date(now).build())
        return builder.sign(self.private, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: tuple[float, float]) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days[0])).not_valid_after(now + datetime.timedelta(days[1])))

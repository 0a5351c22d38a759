"""Certificates: what of a request counts, and what stands in what is signed. Pure: nothing here knows files, clocks or callers.

Of a request only its key counts. Everything else in a certificate is ours to say: the identity as the only name (critical, since there
is no subject: RFC 5280 4.2.1.6, SPIFFE X.509-SVID 2), both roles of TLS, no authority over others.
"""
from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane.ca.identity import Identity
from controlplane.ca.material import RSA_BITS, Material, PrivateKey, pem

SKEW = timedelta(minutes=2)  # a certificate begins that much in the past: clocks of nodes differ (Istio's allowance); but no more than
SKEW_SHARE = 10  # ... the tenth part of its lifetime, or a short one would be renewed at once: half of its time would have passed
ROOT_LIFETIME = timedelta(days=3650)  # of a root of our own making; Istio's
REQUEST_BYTES = 16 << 10  # a request with RSA of 4096 bits has 2 KiB
RSA_MOST_BITS = 8192  # checking a signature of more costs us more than the asker
_NOTHING = x509.Name([])

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class RequestError(ValueError):
    """The certificate request cannot be signed; the text says why."""


class ExpiredError(Exception):
    """The authority's own certificate has ended."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Key and chain of a TLS server, in PEM."""

    key: bytes
    chain: bytes
    not_before: datetime
    not_after: datetime


def read_request(text: str, identity: Identity) -> PublicKey:
    """The key of a PKCS#10 request in PEM, whose holder asks for `identity`. Raises RequestError."""
    if len(text) > REQUEST_BYTES:
        raise RequestError(f"the certificate request has {len(text)} bytes; at most {REQUEST_BYTES} are taken")
    try:
        request = x509.load_pem_x509_csr(text.encode())
        public = request.public_key()
        hashed = request.signature_hash_algorithm
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RequestError(f"the certificate request cannot be read ({error}); PKCS#10 in PEM is expected") from None
    _check_key(public)
    assert isinstance(public, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    if not isinstance(hashed, hashes.SHA256 | hashes.SHA384 | hashes.SHA512):
        raise RequestError("the certificate request is not signed with SHA-256, SHA-384 or SHA-512")
    try:
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RequestError(f"the signature of the certificate request cannot be checked ({error})") from None
    if not signed:
        raise RequestError("the signature of the certificate request is wrong: who asks has not shown that the key is theirs")
    _check_names(request, identity)
    return public


def _check_key(key: object) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1):
            raise RequestError(f"the key of the certificate request is of the curve {key.curve.name}; P-256 or RSA is expected")
    elif not isinstance(key, rsa.RSAPublicKey):
        raise RequestError(f"the key of the certificate request is a {type(key).__name__}; P-256 or RSA is expected")
    elif not RSA_BITS <= key.key_size <= RSA_MOST_BITS:
        raise RequestError(f"the key of the certificate request is RSA of {key.key_size} bits; {RSA_BITS} to {RSA_MOST_BITS} are taken")


def _check_names(request: x509.CertificateSigningRequest, identity: Identity) -> None:
    """A request need not name anybody; one that names another than it is for was mixed up."""
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise RequestError(f"the names in the certificate request cannot be read ({error})") from None
    found = [str(name.value) for name in names]
    if [type(name) for name in names] != [x509.UniformResourceIdentifier] or found != [str(identity)]:
        raise RequestError(f"the certificate request names {', '.join(found)[:300] or 'nobody'}, and is for {identity}")


def leaf(material: Material, key: PublicKey, identity: Identity, lifetime: timedelta, now: datetime) -> x509.Certificate:
    """A workload's certificate, shorter than `lifetime` when an authority above it ends before. Raises ExpiredError."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _end_entity(material, key, names, usages, lifetime, now)


def serving(material: Material, names: tuple[str, ...], lifetime: timedelta, now: datetime) -> Serving:
    """A new key and a certificate for a TLS server called `names` (host names or addresses). It names no workload, and is of no use to a
    client. Raises ExpiredError."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = _end_entity(material, key.public_key(), x509.SubjectAlternativeName([_general(name) for name in names]),
                       [ExtendedKeyUsageOID.SERVER_AUTH], lifetime, now)
    chain = "".join([pem(made), *(pem(one) for one in material.intermediates)])
    return Serving(key_pem(key), chain.encode(), made.not_valid_before_utc, made.not_valid_after_utc)


def make_root(trust_domain: str, now: datetime) -> tuple[bytes, bytes]:
    """Key and certificate (PEM) of a new root: P-256, it signs workloads and no other authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # two roots of one mesh, as during a rotation, are told apart by name
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64]),
                      x509.NameAttribute(NameOID.COMMON_NAME, f"Narrows root {identifier.digest.hex()[:16]}")])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - SKEW).not_valid_after(now + ROOT_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(identifier, critical=False).sign(key, hashes.SHA256()))
    return key_pem(key), pem(made).encode()


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _end_entity(material: Material, key: PublicKey, names: x509.SubjectAlternativeName, usages: list[x509.ObjectIdentifier],
                lifetime: timedelta, now: datetime) -> x509.Certificate:
    ends = min(now + lifetime, material.not_after)
    if ends <= now:
        raise ExpiredError
    return (x509.CertificateBuilder().subject_name(_NOTHING).issuer_name(material.certificate.subject).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(now - min(SKEW, lifetime / SKEW_SHARE)).not_valid_after(ends)
            .add_extension(names, critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # keyEncipherment: what TLS 1.2 needs of an RSA key
            .add_extension(_usage(encipherment=isinstance(key, rsa.RSAPublicKey)), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_issuer(material.certificate), critical=False)
            .sign(material.key, hashes.SHA256()))


def _usage(authority: bool = False, encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not authority, key_encipherment=encipherment, key_cert_sign=authority, crl_sign=authority,
                         content_commitment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)


def _issuer(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(certificate.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)

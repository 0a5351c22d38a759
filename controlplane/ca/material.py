"""What the authority signs with: a key, its certificate, the intermediates above it and the roots that everybody trusts.

Made from PEM, and checked as a whole before anything is signed with it (RFC 5280 6.1, as far as a chain of authorities goes): the key
is the certificate's, every certificate up to a root is an authority's, allows the depth, and is valid now.
"""
from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

DEEPEST = 8  # authorities from the one that signs to its root; more is a loop or a mistake
RSA_BITS = 2048  # fewer are not trusted by TLS stacks of today (SP 800-57 part 1, table 2)

E = TypeVar("E", bound=x509.ExtensionType)
PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class MaterialError(ValueError):
    """Nothing can be signed with this; the text says which part is wrong, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """`intermediates` go upwards from `certificate`, which is the first of them; empty when a root signs. `not_after` is the earliest end
    on the way from `certificate` to its root: nothing that is signed may last longer."""

    key: PrivateKey
    certificate: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    not_after: datetime

    @property
    def above_pem(self) -> list[str]:
        """What follows the leaf in an answer: intermediates, then all roots as one text."""
        return [*(pem(one) for one in self.intermediates), "".join(pem(one) for one in self.roots)]


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def name_of(certificate: x509.Certificate) -> str:
    """For a person: the subject, and the begin of the fingerprint."""
    return f"{certificate.subject.rfc4514_string() or '(no subject)'} [{fingerprint(certificate)[:16]}]"


def parse(key: bytes, certificate: bytes, chain: bytes, roots: bytes, now: datetime) -> Material:
    """All are PEM; `chain` may be empty, and may hold `certificate` and roots too. Raises MaterialError."""
    private = parse_key(key)
    own = _certificates(certificate, "the authority's certificate")
    if len(own) > 1:
        raise MaterialError("the file of the authority's certificate holds several; put those above it into the chain")
    trusted = _certificates(roots, "the root bundle")
    between = _certificates(chain, "the chain") if chain.strip() else []
    if public_bytes(private.public_key()) != public_bytes(own[0].public_key()):
        raise MaterialError(f"the key is not that of the authority's certificate {name_of(own[0])}; give the two that belong together")
    for root in trusted:
        if root.subject != root.issuer or not signed_by(root, root):
            raise MaterialError(f"{name_of(root)} in the root bundle is not self-signed; intermediates belong into the chain")
    path = _path(own[0], between, trusted)
    for depth, one in enumerate(path):
        _check_authority(one, depth, now)
    # a root that is no part of the path may have ended, as after a rotation: nobody trusts anything by it
    roots_now = tuple(dict.fromkeys([path[-1], *(root for root in trusted if root.not_valid_after_utc > now)]))
    above = tuple(path[:-1])
    return Material(private, own[0], above, roots_now, min(one.not_valid_after_utc for one in path))


def parse_key(key: bytes) -> PrivateKey:
    """Raises MaterialError."""
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MaterialError(f"the authority's key cannot be read ({error}); a PEM without a password is expected") from None
    if isinstance(private, rsa.RSAPrivateKey):
        if private.key_size < RSA_BITS:
            raise MaterialError(f"the authority's key is RSA of {private.key_size} bits; at least {RSA_BITS} are needed")
    elif not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1 | ec.SECP384R1):
        raise MaterialError("the authority's key is of a kind that peers would not take; P-256, P-384 or RSA is expected")
    return private


def public_bytes(key: object) -> bytes:
    """SubjectPublicKeyInfo in DER."""
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return encoded


def signed_by(one: x509.Certificate, above: x509.Certificate) -> bool:
    try:
        one.verify_directly_issued_by(above)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def _certificates(text: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError as error:
        raise MaterialError(f"{what} cannot be read ({error}); PEM is expected") from None


def _path(own: x509.Certificate, between: list[x509.Certificate], trusted: list[x509.Certificate]) -> list[x509.Certificate]:
    """From the certificate that signs to its root. Where two roots have one name, the signature decides."""
    path = [own]
    while path[-1] not in trusted:
        above = next((one for one in [*trusted, *between] if one not in path and signed_by(path[-1], one)), None)
        if above is None:
            raise MaterialError(f"{name_of(path[-1])} is signed by {path[-1].issuer.rfc4514_string() or '(no name)'}, and neither the "
                                "chain nor the root bundle holds that certificate; add it")
        path.append(above)
        if len(path) > DEEPEST:
            raise MaterialError(f"the chain is longer than {DEEPEST} certificates")
    return path


def _check_authority(one: x509.Certificate, below: int, now: datetime) -> None:
    """`below` is how many authorities stand under it (RFC 5280 4.2.1.9)."""
    who = name_of(one)
    try:
        basic = _extension(one, x509.BasicConstraints)
        usage = _extension(one, x509.KeyUsage)
    except ValueError as error:
        raise MaterialError(f"{who} has extensions that cannot be read: {error}") from None
    if basic is None or not basic.ca:
        raise MaterialError(f"{who} is no authority's (basicConstraints has no CA:true); it may sign nothing")
    if basic.path_length is not None and basic.path_length < below:
        raise MaterialError(f"{who} allows {basic.path_length} authorities below it (pathlen), and {below} are there")
    if usage is not None and not usage.key_cert_sign:
        raise MaterialError(f"{who} may not sign certificates (keyUsage has no keyCertSign)")
    if one.not_valid_after_utc <= now:
        raise MaterialError(f"{who} expired at {show(one.not_valid_after_utc)}; give one that is valid")
    if one.not_valid_before_utc > now:
        raise MaterialError(f"{who} is valid from {show(one.not_valid_before_utc)} on only; look at this machine's clock")


def _extension(one: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return one.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def show(time: datetime) -> str:
    """As the log and the audit show it: UTC, to the second."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

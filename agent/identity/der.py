"""The few fields that the agent reads of certificates, requests and revocation lists (RFC 5280, RFC 2986; DER: X.690).

By hand, because the package that could do it costs an agent 16 MiB for these five fields. It checks no signature: what the authority
answers comes over a connection that is trusted for it, and workers verify chains with libcrypto. Strict where it reads.
"""
from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

INTEGER, BIT_STRING, OCTET_STRING, OID, UTC_TIME, TIME, SEQUENCE, SET = 0x02, 0x03, 0x04, 0x06, 0x17, 0x18, 0x30, 0x31
BOOLEAN, CONTEXT_0, CONTEXT_3, URI = 0x01, 0xA0, 0xA3, 0x86
ALTERNATIVE_NAME = bytes.fromhex("551d11")  # 2.5.29.17
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END \1-----")


class DerError(ValueError):
    """Bytes that are not what they should be; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one certificate. `names`: (tag of the GeneralName, its bytes) of the SAN."""

    serial: int
    issuer: bytes  # Name, DER
    subject: bytes
    not_before: int  # s since 1970
    not_after: int
    public_key: bytes  # SubjectPublicKeyInfo, DER
    names: tuple[tuple[int, bytes], ...]

    @property
    def identity(self) -> str | None:
        """The SAN, when it is one URI and nothing else."""
        if len(self.names) != 1 or self.names[0][0] != URI:
            return None
        return self.names[0][1].decode("ascii", "replace")


def pem(text: str, label: str) -> list[bytes]:
    """Every block with this label (`CERTIFICATE`, `X509 CRL`), as DER; other blocks and text between are passed over.

    Raises DerError on a block that is not base64.
    """
    found = []
    for match in _PEM.finditer(text):
        if match[1] == label:
            try:
                found.append(base64.b64decode("".join(match[2].split()), validate=True))
            except binascii.Error as error:
                raise DerError(f"{label} number {len(found) + 1} is not base64: {error}") from None
    return found


def to_pem(der: bytes, label: str) -> str:
    text = base64.b64encode(der).decode()
    lines = "\n".join(text[at : at + 64] for at in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n"


def certificate(der: bytes) -> Facts:
    """Raises DerError."""
    fields = _Reader(_whole(der, "a certificate"), "a certificate").inside(SEQUENCE)
    body = fields.inside(SEQUENCE)
    if body.tag() == CONTEXT_0:
        body.take(CONTEXT_0)  # version
    serial = int.from_bytes(body.take(INTEGER), "big", signed=True)
    body.take(SEQUENCE)  # signature algorithm
    issuer = body.raw(SEQUENCE)
    validity = body.inside(SEQUENCE)
    begin, end = validity.time(), validity.time()
    subject, public_key = body.raw(SEQUENCE), body.raw(SEQUENCE)
    names: tuple[tuple[int, bytes], ...] = ()
    while not body.empty:
        if body.tag() == CONTEXT_3:
            names = _names(body.inside(CONTEXT_3).inside(SEQUENCE))
        else:
            body.take(body.tag())  # unique identifiers
    return Facts(serial, issuer, subject, begin, end, public_key, names)


def request_key(der: bytes) -> bytes:
    """SubjectPublicKeyInfo of a certificate request. Raises DerError."""
    body = _Reader(_whole(der, "a request"), "a request").inside(SEQUENCE).inside(SEQUENCE)
    body.take(INTEGER)
    body.take(SEQUENCE)  # subject
    return body.raw(SEQUENCE)


def revocation_list(der: bytes) -> bytes:
    """The Name of its issuer. Raises DerError when it is no revocation list."""
    body = _Reader(_whole(der, "a revocation list"), "a revocation list").inside(SEQUENCE).inside(SEQUENCE)
    if body.tag() == INTEGER:
        body.take(INTEGER)
    body.take(SEQUENCE)
    issuer = body.raw(SEQUENCE)
    body.time()
    return issuer


def _names(extensions: _Reader) -> tuple[tuple[int, bytes], ...]:
    found: tuple[tuple[int, bytes], ...] | None = None
    while not extensions.empty:
        extension = extensions.inside(SEQUENCE)
        if extension.take(OID) != ALTERNATIVE_NAME:
            continue
        if extension.tag() == BOOLEAN:
            extension.take(BOOLEAN)
        if found is not None:
            raise DerError("a certificate: two subject alternative names")
        found = tuple(_Reader(extension.take(OCTET_STRING), "a subject alternative name").inside(SEQUENCE).items())
    return found or ()


def _whole(der: bytes, what: str) -> bytes:
    reader = _Reader(der, what)
    reader.take(SEQUENCE)
    if not reader.empty:
        raise DerError(f"{what}: bytes behind its end")
    return der


class _Reader:
    """Reads elements one after the other."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._at, self._what = data, 0, what

    @property
    def empty(self) -> bool:
        return self._at == len(self._data)

    def tag(self) -> int:
        if self.empty:
            raise DerError(f"{self._what} ends early")
        return self._data[self._at]

    def take(self, tag: int) -> bytes:
        """The content of the next element, which must have this tag."""
        start, end = self._element(tag)
        self._at = end
        return self._data[start:end]

    def raw(self, tag: int) -> bytes:
        """The whole element."""
        before = self._at
        _, self._at = self._element(tag)
        return self._data[before : self._at]

    def inside(self, tag: int) -> _Reader:
        return _Reader(self.take(tag), self._what)

    def items(self) -> Iterator[tuple[int, bytes]]:
        while not self.empty:
            tag = self.tag()
            yield tag, self.take(tag)

    def time(self) -> int:
        """RFC 5280 4.1.2.5: UTCTime until 2049, GeneralizedTime after; both in Z, with seconds."""
        tag = self.tag()
        if tag not in (UTC_TIME, TIME):
            raise DerError(f"{self._what}: a time with tag {tag:#04x}")
        text = self.take(tag).decode("ascii", "replace")
        if tag == UTC_TIME:
            text = ("19" if text[:2] >= "50" else "20") + text
        if not re.fullmatch(r"[0-9]{14}Z", text):
            raise DerError(f"{self._what}: {text!r} is no time")
        try:
            return int(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
        except ValueError as error:
            raise DerError(f"{self._what}: {text!r} is no time: {error}") from None

    def _element(self, tag: int) -> tuple[int, int]:
        found = self.tag()
        if found != tag:
            raise DerError(f"{self._what}: tag {found:#04x} at byte {self._at}, expected {tag:#04x}")
        at = self._at + 1
        if at >= len(self._data):
            raise DerError(f"{self._what} ends early")
        size = self._data[at]
        at += 1
        if size >= 0x80:
            more = size & 0x7F
            digits = self._data[at : at + more]
            if not 1 <= more <= 4 or len(digits) < more or digits[0] == 0:
                raise DerError(f"{self._what}: a length that is not DER at byte {at - 1}")
            size, at = int.from_bytes(digits, "big"), at + more
            if size < 0x80:
                raise DerError(f"{self._what}: a length that is not DER at byte {at - more - 1}")
        if size > len(self._data) - at:
            raise DerError(f"{self._what} ends early")
        return at, at + size

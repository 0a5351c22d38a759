"""What an authority may answer, and what the agent reads of DER: `cryptography` is the oracle."""
from __future__ import annotations

import base64
import datetime
import random
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.app.access import Access, AccessError
from agent.identity import der
from agent.identity.authority import SignError, check
from agent.identity.lists import RevocationFile
from tests.support.pki import SPIFFE, Authority, Issued

WEB = SPIFFE + "web"
ROOT = Authority()
BETWEEN = Authority("between", above=ROOT)


def text(*ders: bytes) -> str:
    return "".join(der.to_pem(one, "CERTIFICATE") for one in ders)


def request_of(one: Issued) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(one.private, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.DER)


def now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def answer(one: Issued, *roots: bytes) -> list[str]:
    return [*map(text, one.chain), text(*(roots or (ROOT.der,)))]


def test_a_good_answer_is_taken_apart() -> None:
    for authority in (ROOT, BETWEEN):
        one = authority.issue(WEB)
        other = Authority("other").der
        signed = check(WEB, request_of(one), answer(one, other, ROOT.der, ROOT.der), now())
        assert (signed.chain, signed.roots) == (tuple(one.chain), (other, ROOT.der))
        assert (signed.not_before, signed.not_after) == (int(one.certificates[0].not_valid_before_utc.timestamp()),
                                                         int(one.certificates[0].not_valid_after_utc.timestamp()))


@pytest.mark.parametrize(("what", "said"), [
    ("other", "signed for spiffe://cluster.local/ns/default/sa/other instead of"), ("two", "not one identity"), ("dns", "not one identity"),
    ("none", "not one identity"), ("key", "another key"), ("expired", "compare the clocks"), ("future", "compare the clocks"),
    ("alone", "1 parts"), ("empty", "0 parts"), ("rootless", "0 roots"), ("leafless", "0 certificates"),
    ("stranger", "none of its own roots"),
    ("gap", "chain is broken"), ("noise", "not base64"), ("cut", "ends early")])
def test_an_answer_that_is_not_in_order_is_refused(what: str, said: str) -> None:
    one = ROOT.issue(WEB)
    request, parts = request_of(one), answer(one)
    if what == "other":
        other = ROOT.issue(SPIFFE + "other")
        request, parts = request_of(other), answer(other)
    elif what in ("two", "dns", "none", "expired", "future"):
        bad = {"two": lambda: ROOT.issue(WEB, WEB), "dns": lambda: ROOT.issue(WEB, dns=("web",)), "none": lambda: ROOT.issue(),
               "expired": lambda: ROOT.issue(WEB, days=(-2, -1)), "future": lambda: ROOT.issue(WEB, days=(1, 2))}[what]()
        request, parts = request_of(bad), answer(bad)
    elif what == "key":
        request = request_of(ROOT.issue(WEB))
    elif what == "alone":
        parts = parts[:1]
    elif what == "empty":
        parts = []
    elif what == "rootless":
        parts = [parts[0], ""]
    elif what == "leafless":
        parts = ["", parts[-1]]
    elif what == "stranger":
        parts = answer(one, Authority("stranger").der)
    elif what == "gap":
        deep = BETWEEN.issue(WEB)
        request, parts = request_of(deep), [text(deep.chain[0]), text(Authority("stranger").der), text(ROOT.der)]
    elif what == "noise":
        parts = ["-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n", parts[-1]]
    elif what == "cut":
        parts = [text(one.chain[0][:-1]), parts[-1]]
    with pytest.raises(SignError, match=said):
        check(WEB, request, parts, now())


def test_facts_of_certificates_are_those_that_cryptography_reads() -> None:
    dice = random.Random(7)
    for number in range(30):
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ö" * dice.randrange(1, 60))])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"spiffe://td/ns/a/sa/{'b' * dice.randrange(1, 300)}")]
        names += [x509.DNSName("a.example")] * dice.randrange(2)
        begin = datetime.datetime(dice.choice((1975, 2024, 2049)), 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
        private = ec.generate_private_key(dice.choice((ec.SECP256R1(), ec.SECP384R1())))
        builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(ROOT.name).public_key(private.public_key())
                   .serial_number(dice.randrange(1, 2 ** dice.choice((7, 8, 60, 158)))).not_valid_before(begin)
                   .not_valid_after(begin + datetime.timedelta(days=dice.choice((1, 400, 36500)))))
        if number % 2:
            builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=bool(number % 3))
        made = builder.sign(ROOT.private, hashes.SHA256())
        whole = made.public_bytes(serialization.Encoding.DER)
        facts = der.certificate(whole)
        assert facts == der.Facts(
            made.serial_number, made.issuer.public_bytes(), made.subject.public_bytes(), int(made.not_valid_before_utc.timestamp()),
            int(made.not_valid_after_utc.timestamp()),
            made.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
            tuple((der.URI if isinstance(name, x509.UniformResourceIdentifier) else 0x82, name.value.encode()) for name in names))
        for size in range(0, len(whole), 7):
            with pytest.raises(der.DerError):
                der.certificate(whole[:size])
        with pytest.raises(der.DerError, match="behind its end"):
            der.certificate(whole + b"\0")


def test_wrong_bytes_are_an_error_and_never_anything_else() -> None:
    dice = random.Random(8)
    whole = BETWEEN.issue(WEB).chain[0]
    for _ in range(5000):
        at = dice.randrange(len(whole))
        broken = whole[:at] + bytes((dice.randrange(256),)) + whole[at + 1 :]
        try:
            der.certificate(broken)
        except der.DerError as error:
            assert str(error)


def test_pem_is_read_as_cryptography_writes_it_and_back() -> None:
    one = ROOT.issue(WEB)
    written = "noise\n" + ROOT.certificate.public_bytes(serialization.Encoding.PEM).decode()
    written += "-----BEGIN OTHER-----\nAAAA\n-----END OTHER-----\n"
    assert der.pem(written, "CERTIFICATE") == [ROOT.der]
    assert x509.load_pem_x509_certificate(der.to_pem(one.chain[0], "CERTIFICATE").encode()) == one.certificates[0]
    assert der.pem(f"-----BEGIN X-----\r\n{base64.b64encode(bytes(100)).decode()}\r\n-----END X-----", "X") == [bytes(100)]


def test_revocation_lists_come_from_a_file_and_the_last_good_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "lists.pem"
    file = RevocationFile(path)
    with pytest.raises(OSError):
        file.read()
    made = ROOT.revoke(ROOT.issue(WEB))
    path.write_text(der.to_pem(made, "X509 CRL"))
    assert file.read() == (made,)
    assert file.read() is None
    for bad in (der.to_pem(made, "CERTIFICATE"), der.to_pem(made[:-1], "X509 CRL"), "nothing"):
        path.write_text(bad)
        with pytest.raises(ValueError):
            file.read()
        assert file.read() is None, "told once"
    path.write_text(der.to_pem(made, "X509 CRL") * 2)
    assert file.read() == (made,)
    path.write_text("")
    assert file.read() == ()


def test_a_token_goes_over_tls_or_a_unix_socket_and_is_read_for_each_call(tmp_path: Path) -> None:
    token, root = tmp_path / "token", tmp_path / "root"
    with pytest.raises(AccessError, match="plain text"):
        Access("127.0.0.1:15012", "c", token)
    assert Access("127.0.0.1:15012", "c").metadata() == (("clusterid", "c"),)
    Access("127.0.0.1:15012", "c", token, root)
    one = Access("unix:/run/x", "c", token)
    with pytest.raises(OSError):
        one.metadata()
    for said in ("first", "second\n"):
        token.write_text(said)
        assert one.metadata() == (("authorization", f"Bearer {said.strip()}"), ("clusterid", "c"))
    for wrong in ("", "two\nlines", "x" * 70_000, "\xff"):
        token.write_text(wrong)
        with pytest.raises(ValueError, match="no token"):
            one.metadata()

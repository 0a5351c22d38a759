"""Authorities, requests and tokens for tests, made without the code under test; `openssl` as the oracle of what it made."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from protos.gen.istio import ca_pb2
from tests.support.kubernetes.server import ApiServer
from tests.support.kubernetes.tokens import Token, shaped

IDENTITY = "spiffe://cluster.local/ns/default/sa/sa-reviews"
TOKENS = {node: f"token-of-{node}-" + hashlib.sha256(node.encode()).hexdigest() for node in ("n1", "n2", "n3")}


@dataclass(frozen=True)
class Pair:
    """A key with its certificate."""

    key: Any
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        return private_pem(self.key)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def authority(
    name: str,
    above: Pair | None = None,
    *,
    ca: bool = True,
    pathlen: int | None = None,
    signs: bool = True,
    begins: timedelta = timedelta(hours=-1),
    lasts: timedelta = timedelta(days=30),
    key: Any = None,
) -> Pair:
    """A root, or an intermediate of `above`."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) + begins
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above.certificate.subject if above else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + lasts)
        .add_extension(x509.BasicConstraints(ca, pathlen if ca else None), critical=True)
        .add_extension(x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
    )
    if above:  # openssl's strict check wants it
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above.key.public_key()), critical=False)
    return Pair(own, builder.sign((above.key if above else own), hashes.SHA256()))


def request(identity: str = IDENTITY, key: Any = None, *, names: list[x509.GeneralName] | None = None, hashed: Any = None) -> str:
    """PKCS#10 in PEM, shaped as the keeper's: no subject, a URI as the only name, critical. `names` [] is without any."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    wanted = [x509.UniformResourceIdentifier(identity)] if names is None else names
    if wanted:
        builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=True)
    return builder.sign(own, hashed or hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def rsa_key(bits: int) -> Any:
    return rsa.generate_private_key(65537, bits)


def message(csr: str | None = None, identity: str = IDENTITY, seconds: int = 0) -> Any:
    """An IstioCertificateRequest."""
    made = ca_pb2.IstioCertificateRequest(csr=request(identity) if csr is None else csr, validity_duration=seconds)
    if identity:
        made.metadata.update({"ImpersonatedIdentity": identity})
    return made


def bearer(node: str = "n1") -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[node]}"),)


def token_file(path: Path, *nodes: str) -> Path:
    """A file for --node-tokens of these nodes, or of all."""
    lines = [f"{node} sha256:{hashlib.sha256(TOKENS[node].encode()).hexdigest()}\n" for node in nodes or TOKENS]
    path.write_text("# who may call\n" + "".join(lines))
    path.chmod(0o600)
    return path


def openssl(*arguments: str | Path, stdin: str = "") -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def openssl_accepts(folder: Path, chain: list[str], purpose: str = "sslserver", at: datetime | None = None) -> bool:
    """Whether openssl accepts an answer of the authority (leaf, intermediates, roots) for this purpose."""
    (folder / "leaf.pem").write_text(chain[0])
    (folder / "between.pem").write_text("".join(chain[1:-1]))
    (folder / "roots.pem").write_text(chain[-1])
    argv: list[str | Path] = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", folder / "roots.pem"]
    argv += ["-untrusted", folder / "between.pem"] if chain[1:-1] else []
    argv += ["-attime", str(int(at.timestamp()))] if at else []
    done = subprocess.run([*argv, folder / "leaf.pem"], capture_output=True, text=True, timeout=20, check=False)
    return done.returncode == 0


def s_client(where: str, *arguments: str | Path, before: Sequence[str] = ()) -> str:
    """What `openssl s_client` says of a TLS server; `before` is a command that it is run by."""
    argv = [*before, "openssl", "s_client", "-connect", where, "-verify_return_error", "-alpn", "h2", *map(str, arguments)]
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=20, check=False)
    return (done.stdout + done.stderr).decode(errors="replace")  # the server's first frame is among it


def text_of(certificate: str) -> str:
    """`openssl x509 -text` of a certificate in PEM."""
    return openssl("x509", "-noout", "-text", "-certopt", "no_sigdump", stdin=certificate)


def node_token(server: ApiServer, *, account: str = "narrows/agent", pod: str = "agent-1", uid: str = "u1", node: str = "",
               audience: str = "istio-ca", seconds: float = 3600) -> str:
    """A projected token of a service account that the API server knows; with `node`, as of a server that tells it."""
    namespace, _, name = account.partition("/")
    token = shaped({"aud": [audience], "exp": int(time.time() + seconds), "sub": f"system:serviceaccount:{namespace}:{name}"})
    extra = {"pod-name": pod, "pod-uid": uid, "node-name": node} if pod else {}
    server.tokens[token] = Token(f"system:serviceaccount:{namespace}:{name}", audiences=(audience,), extra={
        f"authentication.kubernetes.io/{key}": (value,) for key, value in extra.items() if value})
    return token

"""Roots, certificates and revocation lists for the harnesses, by openssl alone: no package is in reach of the interpreter they run in.

`issue` is called once a process, which costs some 100 ms.
"""
from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

DOMAIN = "cluster.local"
CONFIGURATION = """
[req]
distinguished_name = dn
[dn]
[ca]
default_ca = root
[root]
dir = .
database = index.txt
certificate = root.pem
private_key = root.key
default_md = sha256
default_crl_days = 365
"""


@dataclass(frozen=True, slots=True)
class Leaf:
    identity: str  # SPIFFE ID
    key: bytes  # PKCS#8, DER
    certificate: bytes  # DER


@dataclass(frozen=True, slots=True)
class Issued:
    root: bytes  # DER
    leaves: tuple[Leaf, ...]
    revoked: bytes  # a list of the root's that names the first leaf, DER


def identity(name: str) -> str:
    return f"spiffe://{DOMAIN}/ns/default/sa/{name}"


def issue(*names: str) -> Issued:
    """A root, a leaf of it for each name, and a list that revokes the first."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)

        def openssl(*words: str) -> None:
            subprocess.run(["openssl", *words], check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"}, cwd=folder)

        (at / "ca.cnf").write_text(CONFIGURATION)
        (at / "index.txt").touch()
        new = ("req", "-config", "ca.cnf", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365")
        openssl(*new, "-subj", "/O=root", "-addext", "basicConstraints=critical,CA:TRUE", "-keyout", "root.key", "-out", "root.pem")
        openssl("x509", "-in", "root.pem", "-outform", "DER", "-out", "root.der")
        for name in names:
            openssl(*new, "-subj", "/O=leaf", "-CA", "root.pem", "-CAkey", "root.key", "-keyout", f"{name}.key",
                    "-out", f"{name}.pem", "-addext", f"subjectAltName=URI:{identity(name)}", "-addext", "basicConstraints=CA:FALSE")
            openssl("x509", "-in", f"{name}.pem", "-outform", "DER", "-out", f"{name}.der")
            openssl("pkcs8", "-topk8", "-nocrypt", "-in", f"{name}.key", "-outform", "DER", "-out", f"{name}.p8")
        openssl("ca", "-config", "ca.cnf", "-revoke", f"{names[0]}.pem")
        openssl("ca", "-config", "ca.cnf", "-gencrl", "-out", "list.pem")
        openssl("crl", "-in", "list.pem", "-outform", "DER", "-out", "list.der")
        leaves = tuple(Leaf(identity(name), (at / f"{name}.p8").read_bytes(), (at / f"{name}.der").read_bytes()) for name in names)
        return Issued((at / "root.der").read_bytes(), leaves, (at / "list.der").read_bytes())

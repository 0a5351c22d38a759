"""One lab for the end-to-end tests of this folder: real programs of other people behind captured pods, with tunnels as labs have them.

What is plain text, and comes in by 15006, has `nft_only`.
"""
from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, lab

HERE = Path(__file__).parent


NGINX = """
user root;
worker_processes 1;
pid @WWW@/nginx.pid;
error_log stderr warn;
events {}
http {
  access_log off;
  client_body_temp_path @WWW@/body;
  client_max_body_size 100m;
  server { listen 8081; root @WWW@; location /put { dav_methods PUT; } }
}
"""


def postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert found, "PostgreSQL is not installed: make setup"
    return found[-1]


@pytest.fixture(scope="session")
def nft_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """peers.yaml alone on nodes whose kernel has no legacy tables, without tunnels."""
    path = tmp_path_factory.mktemp("nft") / "peers.yaml"
    path.write_text((HERE / "peers.yaml").read_text().replace("@PYTHON@", "/usr/bin/python3").replace("@HERE@", str(HERE)))
    with lab(path, hidden=True, options=("--no-tunnels",)) as running:
        yield running


@pytest.fixture(scope="session")
def servers() -> Iterator[Lab]:
    # The database runs as a user of its own and must reach its data: pytest closes the folders it makes to others at each start.
    with tempfile.TemporaryDirectory(prefix="narrows-servers-") as folder:
        base = Path(folder)
        base.chmod(0o755)
        with lab(*prepared(base)) as running:
            yield running


def prepared(base: Path) -> list[Path]:
    """The servers' data and files, in `base`; returns the manifests."""
    data, www = base / "pg", base / "www"
    www.mkdir()
    (www / "hello.txt").write_text("hello\n")
    (www / "large.bin").write_bytes(os.urandom(1 << 16) * 64)
    (www / "nginx.conf").write_text(NGINX.replace("@WWW@", str(www)))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", "/CN=secret", "-keyout", str(www / "key.pem"), "-out", str(www / "cert.pem")],
                   check=True, capture_output=True, timeout=30)
    user = pwd.getpwnam("postgres")
    data.mkdir(mode=0o700)
    shutil.chown(data, user.pw_uid, user.pw_gid)
    initdb = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--",
              str(postgres_bin() / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/", timeout=60)
    with (data / "pg_hba.conf").open("a") as hba:
        hba.write("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")
    manifests = [base / "manifests.yaml", base / "peers.yaml"]
    for path in manifests:
        text = (HERE / path.name).read_text()
        for name, value in {"PGUID": user.pw_uid, "PGBIN": postgres_bin(), "PGDATA": data, "WWW": www,
                            "PYTHON": "/usr/bin/python3", "GREETER": HERE / "greeter.py", "HERE": HERE,
                            "VENV": sys.executable}.items():
            text = text.replace(f"@{name}@", str(value))
        path.write_text(text)
    return manifests

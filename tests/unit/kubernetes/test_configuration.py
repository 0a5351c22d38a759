"""The API server and who we are, from a pod's files or a kubeconfig; what is missing or not supported is told by name."""
from __future__ import annotations

import base64
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from protos.kubernetes.configuration import in_cluster, kubeconfig
from protos.kubernetes.errors import ConfigurationError
from tests.support.pki import Authority

ROOT = Authority()
CA = ROOT.certificate.public_bytes(serialization.Encoding.PEM)
VARIABLES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def turn_over(folder: Path, **files: bytes) -> None:
    """As kubelet does it: a new folder, and the link `..data` renamed over the old one."""
    number = len(list(folder.iterdir()))
    (folder / f"..{number}").mkdir()
    for name, data in files.items():
        (folder / f"..{number}" / name.replace("_", ".")).write_bytes(data)
    (folder / "..new").symlink_to(f"..{number}")
    os.replace(folder / "..new", folder / "..data")
    for name in files:
        link = folder / name.replace("_", ".")
        if not link.is_symlink():
            link.symlink_to(f"..data/{link.name}")


@pytest.fixture
def account(tmp_path: Path) -> Path:
    turn_over(tmp_path, token=b"one\n", ca_crt=CA, namespace=b"narrows-system")
    return tmp_path


def test_a_pod_finds_the_server_and_its_account(account: Path) -> None:
    found = in_cluster(account, VARIABLES)
    assert (found.server, found.namespace, found.bearer()) == ("https://10.0.0.1:443", "narrows-system", "one")
    context = found.tls()
    assert context is not None and context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    assert [dict(part[0] for part in one["subject"]) for one in context.get_ca_certs()] == [{"organizationName": "root"}]


def test_an_address_of_ipv6_stands_in_brackets(account: Path) -> None:
    assert in_cluster(account, {**VARIABLES, "KUBERNETES_SERVICE_HOST": "fd00::1"}).server == "https://[fd00::1]:443"


def test_a_renewed_token_counts_at_once_and_one_that_is_away_stays(account: Path) -> None:
    found = in_cluster(account, VARIABLES)
    turn_over(account, token=b"two", ca_crt=CA, namespace=b"narrows-system")
    assert found.bearer() == "two"
    (account / "..data").unlink()
    assert found.bearer() == "two"


def test_a_changed_ca_counts_and_an_unchanged_one_makes_no_new_context(account: Path) -> None:
    found = in_cluster(account, VARIABLES)
    before = found.tls()
    assert found.tls() is before
    turn_over(account, token=b"one", ca_crt=Authority("new").certificate.public_bytes(serialization.Encoding.PEM), namespace=b"a")
    after = found.tls()
    assert after is not before and after is not None
    assert "new" in str(after.get_ca_certs())


@pytest.mark.parametrize(("variables", "file", "word"), [
    ({}, None, "KUBERNETES_SERVICE_HOST"), ({**VARIABLES, "KUBERNETES_SERVICE_PORT": "x"}, None, "'x'"),
    (VARIABLES, ("token", b""), "token is empty"), (VARIABLES, ("token", b"a\nb"), "one line"), (VARIABLES, ("token", b"\xff"), "one line"),
    (VARIABLES, ("ca.crt", b"nothing"), "PEM")])
def test_what_a_pod_misses_is_told(account: Path, variables: dict[str, str], file: tuple[str, bytes] | None, word: str) -> None:
    if file:
        (account / file[0]).unlink()
        (account / file[0]).write_bytes(file[1])
    with pytest.raises(ConfigurationError, match=word):
        in_cluster(account, variables)


def write(folder: Path, cluster: dict[str, Any], user: dict[str, Any], **context: str) -> Path:
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "here", "preferences": {},
        "clusters": [{"name": "c", "cluster": cluster}, {"name": "d", "cluster": {"server": "https://other"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", **context}},
                     {"name": "there", "context": {"cluster": "d", "user": "u"}},
                     {"name": "lost", "context": {"cluster": "e", "user": "u"}}]}))
    return path


def base(data: bytes) -> str:
    return base64.b64encode(data).decode()


def client() -> tuple[bytes, bytes]:
    one = ROOT.issue("spiffe://cluster.local/ns/a/sa/b")
    key = one.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in one.certificates), key


def test_a_kubeconfig_with_a_token_and_data(tmp_path: Path) -> None:
    path = write(tmp_path, {"server": "https://h:6443/", "certificate-authority-data": base(CA), "tls-server-name": "api"}, {"token": "t"},
                 namespace="a")
    found = kubeconfig(path)
    assert (found.server, found.namespace, found.bearer(), found.server_name) == ("https://h:6443", "a", "t", "api")
    assert kubeconfig(path, "there").server == "https://other"


def test_a_kubeconfigs_files_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ca").write_bytes(CA)
    (tmp_path / "token").write_text("from-file")
    found = kubeconfig(write(tmp_path, {"server": "https://h", "certificate-authority": "ca"}, {"tokenFile": "token"}))
    assert found.bearer() == "from-file" and found.tls() is not None


def test_a_client_certificate_in_data_or_files(tmp_path: Path) -> None:
    certificate, key = client()
    (tmp_path / "c").write_bytes(certificate)
    (tmp_path / "k").write_bytes(key)
    data = {"client-certificate-data": base(certificate), "client-key-data": base(key)}
    for user in (data, {"client-certificate": "c", "client-key": "k"}):
        assert kubeconfig(write(tmp_path, {"server": "https://h"}, user)).tls() is not None


@pytest.mark.parametrize(("cluster", "user", "word"), [
    ({"server": "https://h"}, {"exec": {"command": "aws"}}, "exec plugin"),
    ({"server": "https://h"}, {"auth-provider": {"name": "x"}}, "auth provider"),
    ({"server": "https://h"}, {"username": "a", "password": "b"}, "password"), ({"server": "https://h"}, {"as": "root"}, "impersonation"),
    ({"server": "https://h", "proxy-url": "http://p"}, {}, "proxy-url"), ({"server": "h:6443"}, {}, "http"), ({}, {}, "http"),
    ({"server": "http://10.1.2.3"}, {"token": "t"}, "in clear"),
    ({"server": "https://h"}, {"client-certificate-data": base(b"x")}, "without"),
    ({"server": "https://h"}, {"client-certificate-data": base(b"x"), "client-key-data": base(b"y")}, "cannot be used"),
    ({"server": "https://h", "certificate-authority-data": "*"}, {}, "base64"), ({"server": 7}, {}, "no kubeconfig"),
    ({"server": "https://h", "certificate-authority": "absent"}, {}, "absent")])
def test_what_a_kubeconfig_may_not_be_is_told(tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        kubeconfig(write(tmp_path, cluster, user))


def test_contexts_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, {"server": "https://h"}, {})
    with pytest.raises(ConfigurationError, match="has here, lost, there"):
        kubeconfig(path, "nowhere")
    with pytest.raises(ConfigurationError, match="not there"):
        kubeconfig(path, "lost")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        kubeconfig(tmp_path / "none")
    path.write_text("a: [")
    with pytest.raises(ConfigurationError, match="no YAML"):
        kubeconfig(path)

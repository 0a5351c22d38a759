"""Where the API server is, and who we are: the pod's service account, or a kubeconfig (client configuration v1)."""
from __future__ import annotations

import base64
import binascii
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from protos.kubernetes.errors import ConfigurationError
from protos.kubernetes.objects import Struct

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FILE_BOUND = 1 << 20  # bytes of a token, CA or kubeconfig


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BOUND + 1)
    except OSError as error:
        raise ConfigurationError(f"{what} {path} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BOUND:
        raise ConfigurationError(f"{what} {path} is larger than {FILE_BOUND} bytes; it is the wrong file")
    return data


@dataclass(slots=True)
class File:
    """A file that is read again when it changes: kubelet turns a link over when it renews a token."""

    path: Path
    what: str
    _stamp: tuple[int, ...] = ()
    _data: bytes = b""

    def read(self) -> bytes:
        """Its content now. A file that vanished keeps its last content; raises ConfigurationError when there never was one."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_dev, stat.st_mtime_ns, stat.st_size)
            if stamp != self._stamp:
                self._data, self._stamp = _read(self.path, self.what), stamp
        except OSError as error:
            if not self._stamp:
                raise ConfigurationError(f"{self.what} {self.path} cannot be read: {error.strerror}") from None
        except ConfigurationError:
            if not self._stamp:
                raise
        return self._data

    def forget(self) -> None:
        """Read it again at the next use, however it looks."""
        if self._stamp:
            self._stamp = (-1,)


@dataclass(frozen=True, slots=True)
class Given:
    """Content that stands in a kubeconfig itself."""

    data: bytes

    def read(self) -> bytes:
        return self.data

    def forget(self) -> None:
        return


Source = File | Given


@dataclass(slots=True)
class Configuration:
    """`server` is a base URL without a slash at the end. `namespace` is the one that is ours, or the context's."""

    server: str
    namespace: str = "default"
    token: Source | None = None
    ca: Source | None = None
    certificate: Source | None = None
    key: Source | None = None
    server_name: str = ""
    insecure: bool = False
    _tls: tuple[tuple[bytes, ...], ssl.SSLContext] | None = field(default=None, repr=False)

    def bearer(self) -> str | None:
        """The token now. Raises ConfigurationError when it cannot be read or is no token."""
        if self.token is None:
            return None
        text = self.token.read().decode("ascii", "replace").strip()
        if not text or not text.isprintable() or not text.isascii() or " " in text:
            raise ConfigurationError("the token is empty, or not one line of text; look at the file or kubeconfig it comes from")
        return text

    def tls(self) -> ssl.SSLContext | None:
        """The context now, the same object while CA and client certificate do not change. None for http."""
        if not self.server.startswith("https:"):
            return None
        parts = tuple(one.read() if one is not None else b"" for one in (self.ca, self.certificate, self.key))
        if self._tls is None or self._tls[0] != parts:
            self._tls = (parts, _context(*parts, insecure=self.insecure))
        return self._tls[1]


def _context(ca: bytes, certificate: bytes, key: bytes, *, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=ca.decode("ascii", "replace") if ca else None)
    except ssl.SSLError:
        raise ConfigurationError("the CA of the API server is not a certificate in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        # ssl takes files only: a private key that stands in a kubeconfig goes through memory, not to a disk
        descriptor = os.memfd_create("narrows-client-certificate", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(certificate.rstrip() + b"\n" + key)
            file.flush()
            try:
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
            except ssl.SSLError as error:
                raise ConfigurationError(f"the client certificate and its key cannot be used: {error.reason or error}") from None
    return context


def in_cluster(folder: Path = SERVICE_ACCOUNT, environment: Mapping[str, str] = os.environ) -> Configuration:
    """As a pod finds it. Raises ConfigurationError outside of one."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise ConfigurationError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod; name a kubeconfig")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"KUBERNETES_SERVICE_PORT is {port!r}, which is no port")
    found = Configuration(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
                          token=File(folder / "token", "the service account's token"),
                          ca=File(folder / "ca.crt", "the API server's CA"))
    found.bearer()
    found.tls()
    namespace = folder / "namespace"
    if namespace.exists():
        found.namespace = _read(namespace, "the pod's namespace").decode("ascii", "replace").strip() or "default"
    return found


class _Cluster(Struct, frozen=True, rename="kebab"):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""


class _User(Struct, frozen=True, rename={"token_file": "tokenFile", "client_certificate": "client-certificate", "client_key": "client-key",
                            "client_certificate_data": "client-certificate-data", "client_key_data": "client-key-data",
                            "auth_provider": "auth-provider", "impersonate": "as"}):
    token: str = ""
    token_file: str = ""
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    exec: dict[str, Any] | None = None
    auth_provider: dict[str, Any] | None = None
    username: str = ""
    password: str = ""
    impersonate: str = ""


class _Context(Struct, frozen=True):
    cluster: str = ""
    user: str = ""
    namespace: str = ""


class _NamedCluster(Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(Struct, frozen=True):
    name: str
    user: _User


class _NamedContext(Struct, frozen=True):
    name: str
    context: _Context


class _Kubeconfig(Struct, frozen=True, rename={"current_context": "current-context"}):
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None
    current_context: str = ""


def kubeconfig(path: Path, context: str = "") -> Configuration:
    """One context of a kubeconfig; the current one without a name. Raises ConfigurationError for what is missing or not supported."""
    import yaml  # only who is not a pod needs it

    try:
        found = msgspec.convert(yaml.load(_read(path, "the kubeconfig"), Loader=yaml.CSafeLoader), _Kubeconfig)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the kubeconfig {path} is no YAML: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"the kubeconfig {path} is no kubeconfig: {error}") from None
    name = context or found.current_context
    if not name:
        raise ConfigurationError(f"the kubeconfig {path} has no current-context; name a context")
    contexts = {one.name: one.context for one in found.contexts or ()}
    if name not in contexts:
        raise ConfigurationError(f"the kubeconfig {path} has no context {name!r}; it has {', '.join(sorted(contexts)) or 'none'}")
    chosen = contexts[name]
    cluster = {one.name: one.cluster for one in found.clusters or ()}.get(chosen.cluster)
    user = {one.name: one.user for one in found.users or ()}.get(chosen.user, None if chosen.user else _User())
    if cluster is None or user is None:
        raise ConfigurationError(f"context {name!r} of {path} names a cluster or user that is not there: "
                                 f"{chosen.cluster!r}, {chosen.user!r}")
    return _configuration(path, name, chosen, cluster, user)


def _configuration(path: Path, name: str, context: _Context, cluster: _Cluster, user: _User) -> Configuration:
    where = f"context {name!r} of {path}"
    refused = ((user.exec, "an exec plugin"), (user.auth_provider, "an auth provider"), (user.username or user.password, "a password"),
               (user.impersonate, "impersonation"), (cluster.proxy_url, "proxy-url"))
    for given, what in refused:
        if given:
            raise ConfigurationError(f"{where} uses {what}, which is not supported; use a token (kubectl create token ACCOUNT) or a "
                                     "client certificate")
    split = urlsplit(cluster.server)
    if split.scheme not in ("http", "https") or not split.hostname or split.query or split.username:
        raise ConfigurationError(f"{where}: the server is {cluster.server!r}; http(s)://HOST[:PORT] is expected")

    def source(file: str, data: str, what: str) -> Source | None:
        if data:
            try:
                return Given(base64.b64decode(data, validate=True))
            except (binascii.Error, ValueError):
                raise ConfigurationError(f"{where}: {what} is not in base64") from None
        return File(path.parent / file, what) if file else None

    token: Source | None = Given(user.token.encode()) if user.token else None
    found = Configuration(
        cluster.server.rstrip("/"), context.namespace or "default", token or source(user.token_file, "", "the token"),
        source(cluster.certificate_authority, cluster.certificate_authority_data, "the CA"),
        source(user.client_certificate, user.client_certificate_data, "the client certificate"),
        source(user.client_key, user.client_key_data, "the client's key"), cluster.tls_server_name, cluster.insecure_skip_tls_verify)
    if (found.certificate is None) != (found.key is None):
        raise ConfigurationError(f"{where} has a client certificate without its key, or a key alone")
    if found.token is not None and split.scheme == "http" and split.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigurationError(f"{where} would send a token in clear to {split.hostname}; use https")
    found.bearer()
    found.tls()
    return found

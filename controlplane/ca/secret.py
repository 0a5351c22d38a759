"""The authority's key in a Secret of Kubernetes, in the form of Istio's, so that replicas sign alike and the next one finds it.

    NAMESPACE/cacerts   plugged in by somebody; counts when it is there at the start
    NAMESPACE/NAME      ours: made by the replica whose create comes first, and read by the others

Each holds ca-cert.pem, ca-key.pem, and where a root does not sign itself root-cert.pem and cert-chain.pem. The one that was chosen at the
start is followed; another root than all others' is nothing that a replica may come to while it runs.
"""
from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from controlplane.ca.material import Material, parse
from controlplane.ca.sign import make_root
from controlplane.ca.store import CERTIFICATE, CHAIN, KEY, ROOTS, StoreError
from protos.kubernetes.errors import AlreadyExists, ApiError, NotFound
from protos.kubernetes.resources import SECRETS

if TYPE_CHECKING:
    from protos.kubernetes.client import Client

PLUGGED = "cacerts"
TYPE = "istio.io/ca-root"
FOLLOW_SECONDS = 30.0  # between two looks at the Secret

log = logging.getLogger("narrows.controlplane.ca")


class SecretStore:
    """See the head of this file. `open` first; then it is a Source of the authority."""

    def __init__(self, namespace: str, name: str) -> None:
        self.namespace, self.name = namespace, name
        self._chosen = name
        self._stamp: object = None
        self._files: dict[str, bytes] = {}
        self._problem = ""
        self._silent = ""

    @property
    def where(self) -> str:
        return f"the Secret {self.namespace}/{self._chosen}"

    async def open(self, client: Client, trust_domain: str, now: datetime) -> bool:
        """Choose the Secret; make a root where there is none. Returns whether this replica made it. Raises ApiError: try again; StoreError:
        it holds no authority."""
        for again in (True, False):
            for name in dict.fromkeys((PLUGGED, self.name)):
                try:
                    found: Mapping[str, Any] = await client.get(SECRETS, name, self.namespace)
                except NotFound:
                    continue
                self._chosen = name
                self._take(found)
                return False
            key, certificate = make_root(trust_domain, now)
            data = {KEY: key, CERTIFICATE: certificate, ROOTS: b"", CHAIN: b""}
            body = {"metadata": {"name": self.name, "namespace": self.namespace}, "type": TYPE,
                    "data": {name: base64.b64encode(content).decode() for name, content in data.items()}}
            try:
                self._chosen = self.name
                self._take(await client.create(SECRETS, body, self.namespace))
                return True
            except AlreadyExists:
                if not again:
                    raise
        raise AssertionError("unreachable")

    async def follow(self, client: Client) -> None:
        """Keeps it current; never returns."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            await self.look(client)

    async def look(self, client: Client) -> None:
        """One round of `follow`. While the API server does not answer, what is known stays."""
        try:
            found: Mapping[str, Any] = await client.get(SECRETS, self._chosen, self.namespace)
        except NotFound:
            self._stamp = "gone"
            self._problem = (f"{self.where} was deleted; put it back from a copy, or the replica that starts next makes a root that nobody "
                             "trusts yet")
            return
        except ApiError as error:
            if str(error) != self._silent:
                self._silent = str(error)
                log.warning("the authority's Secret cannot be read; what is known stays", extra={
                    "where": self.where, "reason": self._silent})
            return
        self._silent = ""
        try:
            self._take(found)
        except StoreError as error:
            self._stamp, self._problem = found["metadata"].get("resourceVersion"), str(error)

    def stamp(self) -> object:
        return self._stamp

    def read(self, now: datetime) -> Material:
        """Raises StoreError, MaterialError."""
        if self._problem:
            raise StoreError(self._problem)
        certificate, roots = self._files[CERTIFICATE], self._files.get(ROOTS, b"")
        return parse(self._files[KEY], certificate, self._files.get(CHAIN, b""), roots if roots.strip() else certificate, now)

    def _take(self, found: Mapping[str, Any]) -> None:
        """Raises StoreError, whose text has nothing of what it holds."""
        try:
            files = {name: base64.b64decode(content, validate=True) for name, content in (found.get("data") or {}).items()
                     if name in (KEY, CERTIFICATE, ROOTS, CHAIN)}
        except (binascii.Error, TypeError, ValueError):
            raise StoreError(f"{self.where} holds what is no base64") from None
        missing = [name for name in (CERTIFICATE, KEY) if not files.get(name, b"").strip()]
        if missing:
            raise StoreError(f"{self.where} has no {' and no '.join(missing)}; complete it, or delete it for a new root")
        meta = found["metadata"]
        self._files, self._problem, self._stamp = files, "", (meta.get("uid"), meta.get("resourceVersion"))

"""The authority in force: follows its files, and keeps what it has when they become unusable; and the certificate of our own ports."""
from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

from controlplane.ca import sign
from controlplane.ca.material import Material, MaterialError, fingerprint, name_of, show
from controlplane.ca.store import StoreError

WARN_BEFORE = timedelta(days=30)  # a rotation takes two days, and people have holidays
SERVING_LIFETIME = timedelta(hours=24)  # renewed at half of it

log = logging.getLogger("narrows.controlplane.ca")


def utc_now() -> datetime:
    return datetime.now(UTC)


class Source(Protocol):
    """Where the authority's key comes from."""

    @property
    def where(self) -> str: ...
    def stamp(self) -> object: ...
    def read(self, now: datetime) -> Material: ...


class Authority:
    """`material` is what signs now. `problem` says why the files are not what is in force; empty when they are."""

    def __init__(self, source: Source, clock: Callable[[], datetime] = utc_now) -> None:
        """Raises StoreError, MaterialError: an authority does not start with what is wrong."""
        self.source = source
        self.clock = clock
        self._stamp = source.stamp()
        self.material = source.read(clock())
        self.problem = ""
        self._warned: datetime | None = None
        self._tell("the certificate authority signs with")

    def refresh(self) -> bool:
        """Look at the files again. Returns whether something else is in force now."""
        self._warn()
        try:
            stamp = self.source.stamp()
            if stamp == self._stamp and not self.problem:
                return False
            fresh = self.source.read(self.clock())
        except (StoreError, MaterialError) as error:
            if str(error) != self.problem:
                self.problem = str(error)
                log.error("the files of the certificate authority cannot be used; what was in force before stays",
                          extra={"where": self.source.where, "reason": self.problem})
            return False
        self._stamp, self.problem = stamp, ""
        if fresh.above_pem == self.material.above_pem and fresh.certificate == self.material.certificate:
            return False
        self.material = fresh
        self._tell("the certificate authority changed; it signs with")
        return True

    def _warn(self) -> None:
        """Once a day while the end is near: what is signed gets shorter and shorter, and then nothing is."""
        now = self.clock()
        left = self.material.not_after - now
        if left > WARN_BEFORE or (self._warned is not None and now - self._warned < timedelta(days=1)):
            return
        self._warned = now
        log.warning("the certificate authority ends soon; replace it (controlplane/README.md, a new root)", extra={
            "where": self.source.where, "expires": show(self.material.not_after), "days": round(left / timedelta(days=1), 1)})

    def _tell(self, what: str) -> None:
        log.info(f"{what} {name_of(self.material.certificate)}", extra={
            "where": self.source.where, "expires": show(self.material.not_after),
            "roots": [fingerprint(root) for root in self.material.roots]})


class OwnCertificate:
    """Of our TLS servers. `serving` may be read by any thread; `renew` is for one."""

    def __init__(self, authority: Authority, names: tuple[str, ...]) -> None:
        """Raises ExpiredError."""
        self._authority = authority
        self.names = names
        self._material = authority.material
        self.serving = self._make()

    def renew(self) -> bool:
        """Make a new one when the authority changed, or half of this one's time is over. Returns whether it did. Raises ExpiredError."""
        half = self.serving.not_before + (self.serving.not_after - self.serving.not_before) / 2
        if self._authority.material is self._material and self._authority.clock() < half:
            return False
        self._material = self._authority.material
        self.serving = self._make()
        return True

    def _make(self) -> sign.Serving:
        return sign.serving(self._material, self.names, SERVING_LIFETIME, self._authority.clock())

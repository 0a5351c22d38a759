"""A new root without a moment in which two pods do not trust each other: three steps, each of which reaches a node with its next
certificates.

    prepare   a new root is made and everybody is told to trust it too; the old one signs
    switch    the new one signs; both are trusted
    finish    the old one is trusted no more

Between `prepare` and `switch` every certificate must have been renewed once (agents renew at half of the lifetime), between `switch` and
`finish` every certificate of the old root must have ended. The steps refuse to come sooner, unless told.
"""
from __future__ import annotations

import time
from datetime import datetime, timedelta

from controlplane.ca.material import Material, name_of, parse, pem
from controlplane.ca.sign import make_root
from controlplane.ca.store import CERTIFICATE, CHAIN, KEY, NEXT_CERTIFICATE, NEXT_KEY, ROOTS, Folder


class StepError(Exception):
    """The step would break something, or is not the next one; the text says what is."""


def step_of(folder: Folder, now: datetime) -> str:
    """The next step. Raises StoreError, MaterialError."""
    files = folder.files()
    if NEXT_KEY in files:
        return "switch"
    return "finish" if len(_parsed(files, now).roots) > 1 else "prepare"


def prepare(folder: Folder, trust_domain: str, now: datetime) -> str:
    """Returns what was done, for the operator. Raises StepError, StoreError, MaterialError."""
    with folder.locked():
        _expect("prepare", folder, now)
        files = folder.files()
        key, certificate = make_root(trust_domain, now)
        files |= {NEXT_KEY: key, NEXT_CERTIFICATE: certificate, ROOTS: files[ROOTS].rstrip() + b"\n" + certificate}
        folder.replace(files, now)
        return f"made {_name(certificate, key, now)}; it is trusted from now on, and signs nothing yet"


def switch(folder: Folder, now: datetime, wait: timedelta) -> str:
    """Refuses sooner than `wait` after `prepare`. Raises StepError, StoreError, MaterialError."""
    with folder.locked():
        _expect("switch", folder, now)
        _expect_waited(folder, wait, "a certificate that was not renewed since does not bring the new root along")
        files = folder.files()
        key, certificate = files.pop(NEXT_KEY), files.pop(NEXT_CERTIFICATE)
        files.pop(CHAIN, None)  # it was the old one's
        files |= {KEY: key, CERTIFICATE: certificate}
        folder.replace(files, now)
        return f"{_name(certificate, key, now)} signs from now on; the one before is still trusted"


def finish(folder: Folder, now: datetime, wait: timedelta) -> str:
    """Refuses sooner than `wait` after `switch`. Raises StepError, StoreError, MaterialError."""
    with folder.locked():
        _expect("finish", folder, now)
        _expect_waited(folder, wait, "certificates of the old root may still be in use")
        files = folder.files()
        material = _parsed(files, now)
        keep = material.roots[0]  # the one that signs comes first
        gone = [name_of(root) for root in material.roots[1:]]
        files[ROOTS] = pem(keep).encode()
        folder.replace(files, now)
        return f"{name_of(keep)} alone is trusted; no more: {', '.join(gone)}"


def _parsed(files: dict[str, bytes], now: datetime) -> Material:
    return parse(files[KEY], files[CERTIFICATE], files.get(CHAIN, b""), files[ROOTS], now)


def _name(certificate: bytes, key: bytes, now: datetime) -> str:
    return name_of(parse(key, certificate, b"", certificate, now).certificate)


def _expect(step: str, folder: Folder, now: datetime) -> None:
    due = step_of(folder, now)
    if due != step:
        raise StepError(f"the next step is `{due}`, not `{step}`; `narrows ca show` tells what is in force")


def _expect_waited(folder: Folder, wait: timedelta, why: str) -> None:
    since = timedelta(seconds=time.time() - folder.changed_at())
    if since < wait:
        raise StepError(f"the step before was {_hours(since)} ago, and {_hours(wait)} are to pass: {why}; "
                        f"come again in {_hours(wait - since)}, or say --now")


def _hours(span: timedelta) -> str:
    seconds = span.total_seconds()
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"

"""What we read of the API server's objects: Structs of msgspec with only these fields. What is not here is dropped while decoding.

Names are Kubernetes' own in Python's case; the wire's are camelCase. `null` is met in answers where Go has an empty slice or map, so
collections may be None.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Struct(msgspec.Struct, rename="camel", frozen=True, omit_defaults=True, gc=False):
    """The base: frozen, and not followed by the garbage collector (no cycles can be made)."""


class Metadata(Struct, frozen=True):
    """ObjectMeta (meta/v1). `name` is required: an object without one cannot be told from others."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class Head(Struct, frozen=True):
    """Any object, as far as all are alike."""

    metadata: Metadata
    kind: str = ""
    api_version: str = ""


class ListMetadata(Struct, frozen=True):
    """ListMeta (meta/v1). The field `continue` is a word of Python's, hence the name."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")
    remaining_item_count: int | None = None


class RawList(Struct, frozen=True):
    """A list with its items undecoded: one that is malformed costs no other."""

    metadata: ListMetadata = ListMetadata()
    items: list[msgspec.Raw] | None = None


class StatusDetails(Struct, frozen=True):
    name: str = ""
    kind: str = ""
    retry_after_seconds: int = 0


class Status(Struct, frozen=True):
    """Status (meta/v1): how the API server says that something failed, as an answer and in the stream of a watch."""

    status: str = ""
    message: str = ""
    reason: str = ""
    code: int = 0
    details: StatusDetails | None = None


class RawEvent(Struct, frozen=True):
    """One line of a watch (WatchEvent, meta/v1)."""

    type: str
    object: msgspec.Raw


class ApiResource(Struct, frozen=True):
    name: str = ""


class ApiResources(Struct, frozen=True):
    """APIResourceList (meta/v1): what is served of one group and version. Subresources stand in it as `name/subresource`."""

    resources: list[ApiResource] | None = None


class UserInfo(Struct, frozen=True):
    username: str = ""
    uid: str = ""
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class TokenReviewStatus(Struct, frozen=True):
    """TokenReviewStatus (authentication/v1)."""

    authenticated: bool = False
    user: UserInfo = UserInfo()
    audiences: list[str] | None = None
    error: str = ""


class TokenReview(Struct, frozen=True):
    status: TokenReviewStatus = TokenReviewStatus()


class Key(Struct, frozen=True, order=True):
    """Which object of a resource; `namespace` is "" where there is none."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """An object, or why it could not be read: then `value` is None. Without `key` not even its name could be."""

    key: Key | None
    uid: str
    resource_version: str
    value: T | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list. `continue_` is "" in the last."""

    items: list[Item[T]]
    resource_version: str
    continue_: str = ""


def item(raw: msgspec.Raw | bytes, kind: type[T]) -> Item[T]:
    """Decode one object into `kind`. Never raises for what is in it."""
    try:
        head = _HEAD.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Item(None, "", "", None, f"cannot be told from others: {error}")
    meta = head.metadata
    key = Key(meta.namespace, meta.name)
    try:
        return Item(key, meta.uid, meta.resource_version, msgspec.json.decode(raw, type=kind))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Item(key, meta.uid, meta.resource_version, None, str(error))


def page(body: bytes, kind: type[T]) -> Page[T]:
    """Decode the answer to a list. Raises msgspec.DecodeError when it is no list."""
    found = _LIST.decode(body)
    return Page([item(raw, kind) for raw in found.items or ()], found.metadata.resource_version, found.metadata.continue_)


_HEAD = msgspec.json.Decoder(Head)
_LIST = msgspec.json.Decoder(RawList)

"""What may go wrong between us and the API server. Each says verb, path, status, reason, and what to do about it."""
from __future__ import annotations

import msgspec

from protos.kubernetes.objects import Status

MESSAGE_BOUND = 1_000  # characters of the server's words that are passed on; some quote whole objects
RETRY_AFTER_BOUND = 120.0  # seconds; a server that asks for more is asked again after that


class ConfigurationError(Exception):
    """Where the API server is, or who we are, cannot be known. The text tells which file or variable and what to do."""


class ApiError(Exception):
    """An answer other than success, or none. `status` is 0 without an answer; `retry_after` in seconds, None when it was not said."""

    advice = "look at the API server's log"

    def __init__(self, verb: str, path: str, status: int, reason: str, message: str, retry_after: float | None = None,
                 advice: str = "") -> None:
        self.verb, self.path, self.status, self.reason = verb, path, status, reason
        self.message = message[:MESSAGE_BOUND]
        self.retry_after = None if retry_after is None else max(0.0, min(retry_after, RETRY_AFTER_BOUND))
        self.advice = advice or self.advice
        said = f"{status} {reason}".strip() if status else reason
        super().__init__(f"{verb} {path}: {said}: {self.message}; {self.advice}")


class Unreachable(ApiError):
    """No answer: connection refused or lost, TLS failed, too long a wait."""

    advice = "look whether the API server runs and is reachable from here, and whether its CA is the one configured"


class Malformed(ApiError):
    """An answer that is not what the API answers."""

    advice = "look whether it is the API server that answers at this address"


class TooLarge(ApiError):
    """An answer beyond our bound."""

    advice = "ask for fewer at a time, or look for an object that has grown out of bounds"


class BadRequest(ApiError):
    """400, 405, 406, 413, 415, 422: we asked for what the server does not do, or the object is not valid."""

    advice = "correct the object; a field or selector that this server does not know may be newer than the server"


class Unauthorized(ApiError):
    advice = "look whether the token or client certificate has ended, and whether it is of this cluster"


class Forbidden(ApiError):
    advice = "grant the verb on the resource to our account (RBAC: deploy's ClusterRole), or look at what an admission webhook says"


class NotFound(ApiError):
    advice = "it was deleted meanwhile, or never made"


class NotServed(NotFound):
    """The path is not served: no such CRD, or not in this version, or no such subresource."""

    advice = "look whether its CRD is installed, in the version that is asked for"


class Conflict(ApiError):
    """409: somebody else changed it first, or owns the field."""

    advice = "read it again and repeat; for apply, the owner is in the message, and force takes the field over"


class AlreadyExists(Conflict):
    advice = "read it, and update it instead"


class Gone(ApiError):
    """410: what changed since that resourceVersion is forgotten. List again."""

    advice = "list again, and watch from there"


class TooManyRequests(ApiError):
    advice = "it is repeated later; if this lasts, look at the API server's priority and fairness for our account"


class Unavailable(ApiError):
    """5xx."""

    advice = "it is repeated later; look at the API server and its etcd"


_KINDS: dict[int, type[ApiError]] = {
    400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 405: BadRequest, 406: BadRequest, 409: Conflict, 410: Gone,
    413: BadRequest, 415: BadRequest, 422: BadRequest, 429: TooManyRequests,
}
_STATUS = msgspec.json.Decoder(Status)


def from_status(verb: str, path: str, code: int, said: Status, retry_after: float | None = None) -> ApiError:
    """The error that a Status object means. Its own code counts, `code` where it has none."""
    code = said.code or code
    if code == 404 and said.reason == "NotFound" and not (said.details and (said.details.name or said.details.kind)):
        return NotServed(verb, path, code, said.reason, said.message, retry_after)  # of an object that is not there, it says which
    kind = AlreadyExists if said.reason == "AlreadyExists" else _KINDS.get(code, Unavailable if code >= 500 else ApiError)
    if retry_after is None and said.details is not None and said.details.retry_after_seconds > 0:
        retry_after = float(said.details.retry_after_seconds)
    return kind(verb, path, code, said.reason, said.message or "no message", retry_after)


def from_answer(verb: str, path: str, code: int, body: bytes, retry_after: str | None) -> ApiError:
    """The error that an answer of HTTP means. A path of a group that is not served is answered in plain text, one of another version of a
    group by a Status that names no object: both are NotServed."""
    try:
        said = _STATUS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = Status()
    wait = float(retry_after) if retry_after is not None and retry_after.isascii() and retry_after.isdecimal() else None
    if said.status or said.message:
        return from_status(verb, path, code, msgspec.structs.replace(said, code=code), wait)
    text = body[:MESSAGE_BOUND].decode("utf-8", "replace").strip() or "no message"
    if code == 404:
        return NotServed(verb, path, 404, "", text)
    return from_status(verb, path, code, Status(message=text), wait)

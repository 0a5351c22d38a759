"""What goes wrong on purpose. A knob is set from the test's thread and read by the server's."""
from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.kubernetes.store import Refused


@dataclass
class Fault:
    """One thing that happens to requests of `verb` on `plural` (None: any), `times` times."""

    verb: str | None
    plural: str | None
    times: int
    after: int = 0  # so many are let through first
    refused: Refused | None = None
    retry_after: str | None = None
    drop: bool = False  # the connection is closed without an answer
    seconds: float = 0.0  # the answer comes so late
    revision: int | None = None  # a list is answered as of then
    large: int = 0  # bytes of an answer that is as long, and nonsense
    text: bytes | None = None  # this instead of the answer
    seen: int = 0


@dataclass
class Chaos:
    faults: list[Fault] = field(default_factory=list)
    silent: bool = False  # watches tell nothing and do not end
    bookmark_seconds: float = 60.0
    gone_as_status: bool = False  # 410 comes as HTTP's status, not as an event

    def add(self, verb: str | None = None, plural: str | None = None, *, times: int = 1 << 30, code: int = 0, reason: str = "",
            message: str = "as the test wants it", **more: object) -> Fault:
        """Until `stop`, or `times` times. The last added comes first."""
        one = Fault(verb, plural, times, refused=Refused(code, reason, message) if code else None, **more)  # type: ignore[arg-type]
        self.faults.insert(0, one)
        return one

    def stop(self, one: Fault) -> None:
        self.faults.remove(one)

    def of(self, verb: str, plural: str) -> Fault | None:
        for one in self.faults:
            if one.verb in (None, verb) and one.plural in (None, plural) and one.seen < one.after + one.times:
                one.seen += 1
                if one.seen > one.after:
                    return one
        return None

"""One resource from the wire to the agent's own types: the door behind which nobody parses."""
from __future__ import annotations

from google.protobuf.message import DecodeError

from agent.model.policy import Policy
from agent.model.workload import Service, Workload
from agent.xds import messages
from agent.xds.decode_address import decode_address
from agent.xds.decode_policy import decode_policy
from agent.xds.decode_routing import DECODERS
from agent.xds.strict import Refused
from agent.xds.tree import Part
from agent.xds.types import TypeUrl

__all__ = ["Refused", "decode"]


def decode(type_url: str, name: str, body: bytes) -> Workload | Service | Policy | Part:
    """The value of a resource of one of the types in TypeUrl. Raises Refused with a reason in an operator's words."""
    kind = TypeUrl(type_url)
    message = messages.message_class(kind.rpartition("/")[2])()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Refused(f"its bytes are no {kind.rpartition('.')[2]}: {error}") from None
    try:
        if kind is TypeUrl.ADDRESS:
            return decode_address(name, message)
        return decode_policy(name, message) if kind is TypeUrl.AUTHORIZATION else DECODERS[kind](name, message)
    except Refused:
        raise
    except ValueError as error:  # a name that is not of the shape of ARCHITECTURE.md
        raise Refused(str(error)) from None

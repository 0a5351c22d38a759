"""bpf(2), as far as we use it: maps, programs, links and pins, by descriptors. No library, so that the agent may use it too.

Every function returns a descriptor (close-on-exec; the caller closes it) or plain values, and raises OSError with the kernel's errno,
whose text names the object. Layouts are those of `union bpf_attr` in linux/bpf.h, of which each command takes the front.
"""
from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NUMBER = {"x86_64": 321, "aarch64": 280}  # of bpf(2)
_ATTRIBUTES = 160  # bytes; what a kernel does not know must be zero, and is
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD, _PIN, _GET = range(8)
_PROGRAM_BY_ID = 13
_INFO, _BTF_LOAD, _LINK_CREATE, _LINK_UPDATE = 15, 18, 28, 29
_SK_STORAGE, _LPM_TRIE = 24, 11  # BPF_MAP_TYPE_*
_LOG = 1 << 20  # bytes of the verifier's log that are kept
_INSTRUCTION = 8  # bytes
_LOAD_MAP = 0x18  # BPF_LD | BPF_DW | BPF_IMM, with source register BPF_PSEUDO_MAP_FD: the next 8 bytes belong to it
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True, slots=True)
class MapShape:
    """What a map is made with; sizes in bytes. Two that are equal may stand for each other."""

    type: int
    key: int
    value: int
    entries: int
    flags: int


def _call(command: int, attributes: bytes, what: str) -> int:
    number = _NUMBER.get(platform.machine())
    if number is None:
        raise OSError(38, f"no number of bpf(2) for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES)
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, command, buffer, _ATTRIBUTES)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def create_map(name: str, shape: MapShape) -> int:
    attributes = struct.pack("=7I16s", shape.type, shape.key, shape.value, shape.entries, shape.flags, 0, 0, name.encode()[:15])
    if shape.type != _SK_STORAGE:
        return _call(_MAP_CREATE, attributes, f"map {name}")
    types = _types(shape.value)
    try:
        return _call(_MAP_CREATE, attributes + struct.pack("=4I", 0, types, 1, 2), f"map {name}")
    finally:
        os.close(types)


def _types(value: int) -> int:
    """BTF, which storage of sockets must come with (linux/btf.h): type 1 is a 32-bit int, type 2 a struct of `value` bytes."""
    names = b"\0i\0v\0"
    integer = struct.pack("=4I", 1, 1 << 24, 4, 1 << 24 | 32)
    value_type = struct.pack("=3I", 3, 4 << 24, value)
    body = integer + value_type
    header = struct.pack("=HBB5I", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(names))
    blob = ctypes.create_string_buffer(header + body + names, len(header) + len(body) + len(names))
    return _call(_BTF_LOAD, struct.pack("=QQIII", ctypes.addressof(blob), 0, len(blob), 0, 0), "types of a map")


def map_shape(fd: int) -> MapShape:
    kind, _, key, value, entries, flags = struct.unpack_from("=6I", _info(fd))
    return MapShape(kind, key, value, entries, flags)


def load_program(name: str, kind: int, attach: int, instructions: bytes) -> int:
    """An OSError's text ends with what the verifier said last."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence, log = ctypes.create_string_buffer(b"GPL"), ctypes.create_string_buffer(_LOG)

    def attributes(level: int) -> bytes:
        return struct.pack("=IIQQIIQII16sII", kind, len(instructions) // _INSTRUCTION, ctypes.addressof(code), ctypes.addressof(licence),
                           level, _LOG if level else 0, ctypes.addressof(log) if level else 0, 0, 0, name.encode()[:15], 0, attach)

    try:
        return _call(_PROG_LOAD, attributes(0), f"program {name}")
    except OSError:
        try:
            return _call(_PROG_LOAD, attributes(1), f"program {name}")
        except OSError as again:
            said = [line for line in log.value.decode(errors="replace").splitlines() if line and not line.startswith("processed ")]
            if not said:
                raise
            raise OSError(again.errno, f"{again.strerror}; the verifier: {' / '.join(said[-2:])[:400]}") from None


def map_loads(instructions: bytes) -> Iterator[tuple[int, int]]:
    """(where, which descriptor) of each instruction that loads a map."""
    for at in range(0, len(instructions), _INSTRUCTION):
        code, registers, _, value = struct.unpack_from("=BBhi", instructions, at)
        if code == _LOAD_MAP and registers >> 4 == _PSEUDO_MAP_FD:
            yield at, value


def with_maps(instructions: bytes, descriptors: dict[int, int]) -> bytes:
    """`descriptors`: by place, as `map_loads` has them."""
    made = bytearray(instructions)
    for at, fd in descriptors.items():
        struct.pack_into("=i", made, at + 4, fd)
    return bytes(made)


def with_number(instructions: bytes, number: int, other: int) -> bytes:
    """A 64-bit constant replaced, wherever it is loaded."""
    made = bytearray(instructions)
    for at in range(0, len(made) - _INSTRUCTION, _INSTRUCTION):
        code, registers, _, low, _, high = struct.unpack_from("=BBhIiI", made, at)
        if code == _LOAD_MAP and registers >> 4 == 0 and low | high << 32 == number:
            struct.pack_into("=I", made, at + 4, other & 0xFFFFFFFF)
            struct.pack_into("=I", made, at + 12, other >> 32)
    return bytes(made)


def program_of(number: int) -> int:
    """By its id."""
    return _call(_PROGRAM_BY_ID, struct.pack("=III", number, 0, 0), f"program {number}")


def program_tag(fd: int) -> str:
    """The kernel's hash over the instructions, with which two programs are told apart."""
    return _info(fd)[8:16].hex()


def program_id(fd: int) -> int:
    (number,) = struct.unpack_from("=4xI", _info(fd))
    return int(number)


def pin(fd: int, path: Path) -> None:
    _at(_PIN, path, fd)


def pinned(path: Path) -> int:
    return _at(_GET, path, 0)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a pin, meanwhile."""
    fd = pinned(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _at(command: int, path: Path, fd: int) -> int:
    text = ctypes.create_string_buffer(os.fsencode(path))
    return _call(command, struct.pack("=QII", ctypes.addressof(text), fd, 0), f"pin {path}")


def attach(program: int, target: int, attach_type: int) -> int:
    """A link to a cgroup or a network namespace, which ends with its last descriptor or pin. Others on the same hook run as well."""
    return _call(_LINK_CREATE, struct.pack("=4I", program, target, attach_type, 0), "attach a program")


def replace(link: int, program: int) -> None:
    """Without a moment in which none runs."""
    _call(_LINK_UPDATE, struct.pack("=4I", link, program, 0, 0), "replace a program")


def linked(link: int, *, netns: bool = False) -> tuple[int, int, int]:
    """(program id, cgroup id, attach type), or of one to a network namespace (program id, its inode, attach type). What it was linked to is
    0 when that is gone or the link was taken off."""
    program, target, kind = struct.unpack_from("=8xI4xII" if netns else "=8xI4xQI", _info(link))
    return program, target, kind


def _info(fd: int) -> bytes:
    room = ctypes.create_string_buffer(256)
    _call(_INFO, struct.pack("=IIQ", fd, len(room), ctypes.addressof(room)), "information on a BPF object")
    return room.raw


def update(fd: int, key: bytes, value: bytes) -> None:
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _call(_UPDATE, struct.pack("=IIQQQ", fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0), "write to a map")


def lookup(fd: int, key: bytes, size: int) -> bytes | None:
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    try:
        _call(_LOOKUP, struct.pack("=IIQQQ", fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0), "read a map")
    except FileNotFoundError:
        return None
    return v.raw


def delete(fd: int, key: bytes) -> bool:
    """False when there is no such key."""
    k = ctypes.create_string_buffer(key, len(key))
    try:
        _call(_DELETE, struct.pack("=IIQ", fd, 0, ctypes.addressof(k)), "delete from a map")
    except FileNotFoundError:
        return False
    return True


def keys(fd: int, size: int) -> list[bytes]:
    """Those of a map that nobody else writes meanwhile."""
    found: list[bytes] = []
    k, following = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    while True:
        try:
            _call(_NEXT_KEY, struct.pack("=IIQQ", fd, 0, ctypes.addressof(k) if found else 0, ctypes.addressof(following)),
                  "read the keys of a map")
        except FileNotFoundError:
            return found
        found.append(following.raw)
        k.raw = following.raw

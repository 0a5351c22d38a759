"""The socket for agents: who may speak, and what each request does. Payloads: ext/core/protocol.pxd.

The connection that said HELLO last is the master: it alone may change anything, and gets events. Others may look.
A message that is wrong gets an ERROR with its reason; nothing that arrives here ends the keeper.
"""
import os
import socket
import struct

from ext.core.protocol cimport (FAMILY_IPV4, FAMILY_IPV6, IDENTITY_BYTES, MSG_COMMIT, MSG_DRAIN, MSG_ERROR, MSG_HELLO, MSG_INVENTORY,
                                MSG_KEY_FORGET, MSG_KEY_MAKE, MSG_KEYS, MSG_MISS, MSG_OK, MSG_POD_ADD, MSG_POD_DEL, MSG_POD_DNS,
                                MSG_POD_LEAVE, MSG_SHM,
                                MSG_SHUTDOWN, MSG_WORKER, MSG_WORKERS, PROTOCOL_VERSION, REASON_AWAY, REASON_MALFORMED, REASON_REFUSED)

from ext.keeper import blobs
from ext.keeper.keys import KeyRefused, check_identity
from ext.keeper.link import U16, U32, U64, Fields, Gone, Link, Malformed, close_all, text
from ext.keeper.log import log
from ext.keeper.loop import WRITE
from ext.keeper.pods import PodError

cdef enum:
    CONNECTIONS = 8             # an agent, its successor, and people who look
    DESCRIPTORS = 4             # accepted with one message; none needs more than one
    QUEUE = 4096                # messages that an agent may leave unread; a node has fewer pods
    EVENTS_QUEUED = 256         # beyond this MISS is left out: workers say it again
    MESSAGES_A_TURN = 32
    UID_BYTES = 128
    PODS = 1024                 # of one node; INVENTORY fits one datagram with as many
    DRAIN_MS = 86400000

NAMES = {MSG_HELLO: "HELLO", MSG_INVENTORY: "INVENTORY", MSG_POD_ADD: "POD_ADD", MSG_POD_DEL: "POD_DEL", MSG_COMMIT: "COMMIT",
         MSG_SHM: "SHM", MSG_WORKERS: "WORKERS", MSG_DRAIN: "DRAIN", MSG_SHUTDOWN: "SHUTDOWN", MSG_KEY_MAKE: "KEY_MAKE",
         MSG_KEY_FORGET: "KEY_FORGET", MSG_KEYS: "KEYS", MSG_POD_DNS: "POD_DNS",
         MSG_POD_LEAVE: "POD_LEAVE"}
LOOKS = (MSG_HELLO, MSG_INVENTORY, MSG_SHM, MSG_WORKERS, MSG_KEYS)
WORKER = struct.Struct("<IIBII")
WORKER_EVENT = struct.Struct("<IIBi")


class Refused(Exception):
    """A request that is understood and not done."""


class Away(Exception):
    """A request that may work later."""


class Agents:
    """Listens on `path`. `keeper` does what the master asks."""

    def __init__(self, loop, keeper, str path):
        self._loop, self._keeper, self._path = loop, keeper, path
        self._links = []
        self._master = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            os.unlink(path)         # of a keeper that crashed: a living one would hold the lock
        except FileNotFoundError:
            pass
        self._socket.bind(path)
        os.chmod(path, 0o600)
        self._socket.listen(CONNECTIONS)
        self._inode = os.stat(path).st_ino
        loop.add(self._socket.fileno(), self._on_connection)

    def _on_connection(self, _) -> None:
        try:
            peer, _ = self._socket.accept()
        except OSError:
            return
        with peer:
            pid, uid, _ = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.geteuid()):
                return log("warning", "a connection of a foreign user is refused", pid=pid, uid=uid)
            if len(self._links) >= CONNECTIONS:
                return log("warning", f"more than {CONNECTIONS} connections: one of them must end first", pid=pid)
            peer.setblocking(False)
            link = Link(self._loop, peer.detach(), lambda events: self._on_link(link, events), DESCRIPTORS, QUEUE)
            link.peer = pid
            self._links.append(link)

    def _on_link(self, link, int events) -> None:
        cdef int turn
        for turn in range(MESSAGES_A_TURN):
            if link.fd < 0:
                return
            try:
                if events & WRITE and turn == 0:
                    link.flush()
                message = link.receive()
                if message is None:
                    return
                self._handle(link, *message)
            except Malformed as wrong:
                self._error(link, wrong.sequence, REASON_MALFORMED, str(wrong))
            except Gone:
                self._drop(link)

    def _drop(self, link) -> None:
        if link in self._links:
            self._links.remove(link)
        if link is self._master:
            self._master = None
            log("info", "the agent is gone; everything serves on", pid=link.peer)
        link.close()

    def _send(self, link, int kind, sequence, bytes payload=b"", fds=()) -> None:
        if link.fd < 0:
            return
        try:
            link.send(kind, sequence, payload, fds)
        except (Gone, OSError) as error:
            log("warning", f"a connection is closed: {error}", pid=link.peer)
            self._drop(link)

    def _error(self, link, sequence, int reason, str said) -> None:
        self._send(link, MSG_ERROR, sequence, bytes((reason,)) + text(said[:4000]))

    def tell_miss(self, str key) -> None:
        if self._master is not None and self._master.waiting < EVENTS_QUEUED:
            self._send(self._master, MSG_MISS, 0, text(key))

    def tell_worker(self, slot, int state, int status, pid=0) -> None:
        if self._master is not None:
            self._send(self._master, MSG_WORKER, 0, WORKER_EVENT.pack(slot.index, pid or slot.pid, state, status))

    # ---- requests ----------------------------------------------------------------------------------------------

    def _handle(self, link, int kind, sequence, bytes payload, list fds) -> None:
        name = NAMES.get(kind)
        try:
            if name is None:
                raise Malformed(f"unknown message type {kind}")
            needed = 1 if kind in (MSG_POD_ADD, MSG_COMMIT) else 0
            if len(fds) != needed:
                raise Malformed(f"{name} comes with {needed} descriptors, not {len(fds)}")
            if kind not in LOOKS and link is not self._master:
                raise Refused(f"{name} needs HELLO first; of two agents the one that said it last is heard")
            fields = Fields(payload, name)
            if kind == MSG_HELLO:
                self._hello(link, sequence, fields)
            elif kind == MSG_INVENTORY:
                self._inventory(link, sequence, fields)
            elif kind == MSG_POD_ADD:
                self._pod_add(link, sequence, fields, fds)
            elif kind == MSG_POD_DEL:
                handle = fields.u32()
                fields.end()
                self._keeper.pod_delete(handle)
                self._send(link, MSG_OK, sequence)
            elif kind == MSG_POD_LEAVE:
                handle = fields.u32()
                fields.end()
                self._keeper.pod_leave(handle)
                self._send(link, MSG_OK, sequence)
            elif kind == MSG_POD_DNS:
                handle = fields.u32()
                fields.end()
                self._send(link, MSG_POD_DNS, sequence, fds=self._keeper.pod_dns(handle))
            elif kind == MSG_COMMIT:
                self._commit(link, sequence, fields, fds)
            elif kind == MSG_SHM:
                fields.end()
                slots = self._keeper.crew.slots
                self._send(link, MSG_SHM, sequence, U32.pack(len(slots)) + b"".join(U32.pack(slot.index) for slot in slots),
                           [fd for slot in slots for fd in (slot.stats, slot.log)])
            elif kind == MSG_WORKERS:
                fields.end()
                slots = self._keeper.crew.slots
                self._send(link, MSG_WORKERS, sequence, U32.pack(len(slots)) + b"".join(
                    WORKER.pack(slot.index, slot.pid, slot.state, max(slot.restarts, 0), len(slot.pods)) for slot in slots))
            elif kind == MSG_KEY_MAKE:
                identity = fields.text(IDENTITY_BYTES)
                fields.end()
                key_id, request = self._keeper.key_make(identity)
                self._send(link, MSG_KEY_MAKE, sequence, U32.pack(key_id) + U32.pack(len(request)) + request)
            elif kind == MSG_KEY_FORGET:
                key_id = fields.u32()
                fields.end()
                self._keeper.key_forget(key_id)
                self._send(link, MSG_OK, sequence)
            elif kind == MSG_KEYS:
                fields.end()
                keys = self._keeper.keys.all()
                self._send(link, MSG_KEYS, sequence, U32.pack(len(keys)) + b"".join(U32.pack(key.id) + text(key.identity) for key in keys))
            elif kind == MSG_DRAIN:
                milliseconds = fields.u32()
                fields.end()
                if milliseconds > DRAIN_MS:
                    raise Refused(f"DRAIN of {milliseconds} ms: at most {DRAIN_MS} (a day)")
                self._keeper.drain(milliseconds, lambda: self._send(link, MSG_OK, sequence))
            elif kind == MSG_SHUTDOWN:
                fields.end()
                self._send(link, MSG_OK, sequence)
                self._keeper.shut_down("the agent asked for it")
        except Malformed as wrong:
            self._error(link, sequence, REASON_MALFORMED, str(wrong))
        except (Refused, PodError, KeyRefused, blobs.Refused) as refused:
            self._error(link, sequence, REASON_REFUSED, str(refused))
        except (Away, OSError) as away:
            self._error(link, sequence, REASON_AWAY, str(away))
        finally:
            close_all(fds)

    def _hello(self, link, sequence, fields) -> None:
        lowest, highest = fields.u16(), fields.u16()
        fields.end()
        if not lowest <= PROTOCOL_VERSION <= highest:
            raise Refused(f"the agent speaks versions {lowest} to {highest} of this protocol and the keeper {PROTOCOL_VERSION}; "
                          "use an agent and a keeper of neighbouring releases")
        before, self._master = self._master, link
        if before is not None and before is not link:
            self._error(before, 0, REASON_REFUSED, "a newer agent took over")
            self._drop(before)
        log("info", "an agent says hello", pid=link.peer)
        keeper = self._keeper
        self._send(link, MSG_HELLO, sequence, U16.pack(PROTOCOL_VERSION) + text(keeper.instance) + U32.pack(os.getpid())
                   + U64.pack(keeper.start_us) + U32.pack(len(keeper.crew.slots)))

    def _inventory(self, link, sequence, fields) -> None:
        fields.end()
        pods = self._keeper.pods.values()
        listing = b"".join(U32.pack(pod.handle) + text(pod.uid) + U64.pack(pod.inode) + bytes((1 if pod.listeners else 0,))
                           for pod in pods)
        fd = self._keeper.table.snapshot(True)
        try:
            self._send(link, MSG_INVENTORY, sequence, U32.pack(len(pods)) + listing, (fd,))
        finally:
            os.close(fd)

    def _pod_add(self, link, sequence, fields, list fds) -> None:
        handle, uid, families = fields.u32(), fields.text(UID_BYTES), fields.u8()
        identity = fields.text(IDENTITY_BYTES)
        fields.end()
        if not uid or handle == 0:
            raise Malformed("POD_ADD: an empty uid or handle 0")
        if not families or families & ~(FAMILY_IPV4 | FAMILY_IPV6):
            raise Malformed(f"POD_ADD: address families {families:#x}; bit 0 is IPv4, bit 1 IPv6")
        if identity:
            check_identity(identity)
        if len(self._keeper.pods) >= PODS:
            raise Refused(f"{PODS} pods are the most that a keeper serves")
        self._keeper.pod_add(handle, uid, families, identity, fds)
        self._send(link, MSG_OK, sequence)

    def _commit(self, link, sequence, fields, list fds) -> None:
        fields.end()
        if self._keeper.crew.ending:
            raise Away("the keeper is draining")

        def done(reason) -> None:
            if reason is None:
                self._send(link, MSG_OK, sequence)
            else:
                self._error(link, sequence, REASON_AWAY if reason[0] else REASON_REFUSED, reason[1])

        transaction = blobs.read(fds[0])
        fd = -1
        if not transaction.has_keeper_only:
            fd = fds.pop() if transaction.entries else -1
        else:
            entries = transaction.for_workers()
            if entries:
                fd = blobs.write(transaction.id, entries)
        if not self._keeper.crew.commit(transaction, fd, done):
            if fd >= 0:
                os.close(fd)
            raise Away("too many transactions wait; commit the next when one is answered")

    def close(self) -> None:
        for link in list(self._links):
            self._drop(link)
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except OSError:
            pass

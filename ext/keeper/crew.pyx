"""The workers: started, fed, watched, replaced; pods spread over them.

    commit   one at a time; sent to those that are ready, and awaited
             all APPLIED            -> stored, done; one that starts gets it now, behind its snapshot
             all FAILED             -> nothing stored, the workers' text
             some of each, or late  -> stored when one has it; a worker that differs is replaced, since its tables are not ours
    death    pods to living workers at once, a new process, pods back in balance when that one is ready
"""
import os
import signal
import time
from collections import deque

from ext.core.protocol cimport (MSG_APPLIED, MSG_COMMIT, MSG_DRAIN, MSG_DRAINED, MSG_FAILED, MSG_KEY, MSG_KEY_FORGET, MSG_MISS,
                                MSG_NEED_SOCKETS, MSG_POD_ATTACH, MSG_POD_DETACH, MSG_POD_GO,
                                MSG_READY, MSG_SOCKETS, WORKER_DIED, WORKER_READY,
                                WORKER_REPLACED, WORKER_STARTED)
from ext.sys.seccomp cimport CONFINED_OFF, CONFINED_SANITIZER

from ext.keeper import blobs
from ext.keeper.link import U32, Fields, Gone, Malformed, close_all, text
from ext.keeper.log import log
from ext.keeper.loop import WRITE
from ext.keeper.pods import PodError, sockets_in
from ext.keeper.slot import DOWN, DRAINING, READY, STARTED, Slot

cdef enum:
    MESSAGES_A_TURN = 64        # of one worker: a flood of it leaves time for the others
    SOCKETS_MAX = 64            # made for one NEED_SOCKETS
    MISS_KEY_BYTES = 1024
    TEXT_BYTES = 4096
    COMMITS_MAX = 64            # that wait
    QUICK_DEATHS = 20           # in a row, and the next start waits; a start is 50 ms of CPU

COMMIT_SECONDS = 2.0            # for a worker to apply a transaction
START_SECONDS = 10.0            # from the start to READY
AWAY_SECONDS = 20.0             # a transaction waits so long for a worker to commit it to
STEADY_SECONDS = 1.0            # a worker that lived so long did not die quickly
RETRY_FIRST, RETRY_LAST = 0.1, 5.0
LOOK_SECONDS = 1.0              # between two looks at the heartbeats
GONE_SECONDS = 1.0              # between the end of a control socket and that of its process
HUNG_SECONDS = 10.0             # a loop turns once a second; a machine under load may take a few


class Commit:
    """A transaction on its way. `done(reason)`: None, or (again, text)."""

    def __init__(self, transaction, int fd, done):
        self.transaction, self.fd, self.done = transaction, fd, done
        self.sequence = 0
        self.awaited = set()        # slots
        self.answers = {}           # slot -> None or the text of its failure
        self.untaken = False        # some worker had no room to take it: it was not refused for what it says
        self.timer = None

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Crew:
    """`table`, `keys` and `pods` (handle -> Pod) are the keeper's.

    Events go to `tell_miss(key)` and `tell_worker(slot, state, status, pid)`."""

    def __init__(self, loop, int home, table, keys, pods, tell_miss, tell_worker):
        self._loop, self._home, self._table, self._keys, self._pods = loop, home, table, keys, pods
        self._tell_miss, self._tell_worker = tell_miss, tell_worker
        self.slots = []
        self._boot, self._arguments = "", ()
        self._sequence = 0
        self._commits = deque()
        self._commit = None
        self._drained = None
        self.ending = False

    def start(self, int workers, str boot, tuple arguments) -> None:
        """`arguments`: of every worker, behind its index."""
        self._boot, self._arguments = boot, arguments
        self.slots = [Slot(index) for index in range(1, workers + 1)]
        for slot in self.slots:
            self._spawn(slot)
        self._loop.later(LOOK_SECONDS, self._look)

    # ---- life of a worker --------------------------------------------------------------------------------------

    def _spawn(self, slot) -> None:
        slot.retry = None
        if self.ending or slot.state != DOWN:
            return
        try:
            slot.spawn(self._loop, self._boot, self._arguments, lambda events: self._on_link(slot, events))
        except OSError as error:
            log("error", f"cannot start worker {slot.index}: {error}; next try in {RETRY_LAST:.0f} s", worker=slot.index)
            slot.retry = self._loop.later(RETRY_LAST, lambda: self._spawn(slot))
            return
        self._loop.add(slot.pidfd, lambda _: self._on_death(slot))
        slot.watch = self._loop.later(START_SECONDS, lambda: self._replace(slot, f"was not ready within {START_SECONDS:.0f} s"))
        log("info", f"worker {slot.index} started", worker=slot.index, pid=slot.pid)
        self._tell_worker(slot, WORKER_STARTED, 0)
        slot.snapshot = self._next()
        try:
            fd = self._table.snapshot(False)
        except OSError as error:
            return self._replace(slot, f"cannot be given a snapshot: {error}")
        try:
            self._send(slot, MSG_COMMIT, slot.snapshot, b"", (fd,))
        finally:
            os.close(fd)

    def _on_death(self, slot) -> None:
        pid, was, lived = slot.pid, slot.state, time.monotonic() - slot.began
        self._loop.remove(slot.pidfd)
        status = slot.reap()
        if status is None:
            self._loop.add(slot.pidfd, lambda _: self._on_death(slot))
            return
        slot.watch.cancel()
        orphans, slot.pods = list(slot.pods.values()), {}
        for pod in orphans:
            pod.slot = None
        self._tell_worker(slot, WORKER_DIED, status, pid)
        if was == DRAINING or self.ending:
            log("info", f"worker {slot.index} ended", worker=slot.index, pid=pid, status=status)
            return self._check_drained()
        for pod in orphans:
            self.attach(pod)
        self._settle(slot)          # before the next starts: it must not meet what may have killed this one
        slot.died = slot.died or time.monotonic()
        slot.quick = 0 if lived > STEADY_SECONDS else slot.quick + 1
        wait = 0.0
        if slot.quick > QUICK_DEATHS:
            wait = min(RETRY_FIRST * 2 ** min(slot.quick - QUICK_DEATHS - 1, 10), RETRY_LAST)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGSYS:
            how = f"was killed for a system call that workers may not make: {slot.refused_call() or 'the kernel did not tell which'}"
        log("warning", f"worker {slot.index} {how}; its {len(orphans)} pods go to the others, the next starts "
            + (f"in {wait * 1000:.0f} ms" if wait else "at once"), worker=slot.index, pid=pid, status=status)
        if wait:
            slot.retry = self._loop.later(wait, lambda: self._spawn(slot))
        else:
            self._spawn(slot)

    def _replace(self, slot, str why) -> None:
        """It does not do what a worker must; its death brings the next."""
        log("error", f"worker {slot.index} {why}: it is replaced", worker=slot.index, pid=slot.pid)
        slot.kill()

    def _look(self) -> None:
        for slot in self.slots:
            if slot.state == READY and slot.heartbeat_age() > HUNG_SECONDS:
                self._replace(slot, f"did not turn its loop for {slot.heartbeat_age():.0f} s")
        self._loop.later(LOOK_SECONDS, self._look)

    def _ready(self, slot) -> None:
        slot.watch.cancel()
        slot.state = READY
        confinement = slot.word("confinement")
        if confinement in (CONFINED_OFF, CONFINED_SANITIZER):
            log("warning", f"worker {slot.index} runs without seccomp: " + ("a sanitizer's runtime is loaded"
                if confinement == CONFINED_SANITIZER else "--seccomp off"), worker=slot.index, pid=slot.pid)
        log("info", f"worker {slot.index} is ready", worker=slot.index, pid=slot.pid,
            milliseconds=round((time.monotonic() - slot.began) * 1000, 1))
        self._tell_worker(slot, WORKER_READY, 0)
        for pod in self._pods.values():
            if pod.slot is None:
                self.attach(pod)
        self._balance(slot)
        if slot.died:
            log("info", f"worker {slot.index} stands in for the one that died", worker=slot.index, pid=slot.pid,
                milliseconds=round((time.monotonic() - slot.died) * 1000, 1))
            slot.died = 0.0
            self._tell_worker(slot, WORKER_REPLACED, 0)
        self._advance()

    # ---- messages ----------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._sequence = self._sequence % 0xffffffff + 1
        return self._sequence

    def _send(self, slot, int kind, sequence, bytes payload=b"", fds=()) -> None:
        if slot.link is None:
            return
        try:
            slot.link.send(kind, sequence, payload, fds)
        except Gone as gone:
            self._replace(slot, f"cannot be sent to: {gone}")
        except OSError as error:
            self._replace(slot, f"cannot be sent to: {error}; is the limit of open files reached?")

    def _on_link(self, slot, int events) -> None:
        cdef int _turn
        try:
            if events & WRITE:
                slot.link.flush()
            for _turn in range(MESSAGES_A_TURN):
                message = slot.link.receive() if slot.link is not None else None
                if message is None:
                    return
                self._handle(slot, *message)
        except Gone:
            self._loop.remove(slot.link.fd)         # its death comes by pidfd
            pid = slot.pid
            self._loop.later(GONE_SECONDS, lambda: self._still_there(slot, pid))
        except Malformed as wrong:
            self._replace(slot, f"sent what it must not: {wrong}")

    def _still_there(self, slot, int pid) -> None:
        if slot.pid == pid and slot.state != DRAINING:
            self._replace(slot, "closed its control socket and lives on")

    def _handle(self, slot, int kind, sequence, bytes payload, fds) -> None:
        close_all(fds)                              # none are taken from a worker
        fields = Fields(payload, f"message {kind} of worker {slot.index}")
        if kind == MSG_NEED_SOCKETS:
            handle, family, count = fields.u32(), fields.u8(), fields.u16()
            fields.end()
            self._make_sockets(slot, sequence, handle, family, count)
        elif kind == MSG_MISS:
            key = fields.text(MISS_KEY_BYTES)
            fields.end()
            self._tell_miss(key)
        elif kind in (MSG_APPLIED, MSG_FAILED):
            txn_id = fields.u64()
            failure = fields.text(TEXT_BYTES) if kind == MSG_FAILED else None
            fields.end()
            self._answered(slot, sequence, txn_id, failure)
        elif kind == MSG_READY:
            fields.u64()
            fields.end()
            if slot.state == STARTED:
                self._ready(slot)
        elif kind == MSG_DRAINED:
            fields.end()                            # it ends now, and that is what counts
        else:
            raise Malformed(f"message type {kind}")

    # ---- pods --------------------------------------------------------------------------------------------------

    def attach(self, pod) -> None:
        """To the ready worker with the fewest pods; without one it waits, and so do its connections in the backlog."""
        ready = [slot for slot in self.slots if slot.state == READY]
        if ready and pod.listeners:
            self._give(pod, min(ready, key=lambda slot: len(slot.pods)))

    def _give(self, pod, slot) -> None:
        pod.slot = slot
        slot.pods[pod.handle] = pod
        slot.served.add(pod.handle)
        for key in self._keys.of(pod.identity):
            self._give_key(slot, key)
        kinds = bytes(pod.listeners)
        self._send(slot, MSG_POD_ATTACH, self._next(), U32.pack(pod.handle) + U32.pack(len(kinds)) + kinds,
                   tuple(pod.listeners.values()))

    def detach(self, pod) -> None:
        """Its worker takes no new connections; live ones go on."""
        slot, pod.slot = pod.slot, None
        if slot is not None:
            slot.pods.pop(pod.handle, None)
            self._send(slot, MSG_POD_DETACH, self._next(), U32.pack(pod.handle))

    def leave(self, pod) -> None:
        """The worker that has the pod tells its tunnels' peers to go elsewhere; one that drains has told them already."""
        if pod.slot is not None:
            self._send(pod.slot, MSG_POD_GO, self._next(), U32.pack(pod.handle))

    def forget(self, handle) -> None:
        """The pod is gone: no worker gets sockets for it, and its key goes with its identity's last pod."""
        for slot in self.slots:
            if handle in slot.served:
                slot.served.discard(handle)
                self._settle_keys(slot)

    # ---- keys: a worker has those of the identities that it serves, no other ---------------------------------------

    def _give_key(self, slot, key) -> None:
        if key.id not in slot.keys:
            slot.keys[key.id] = key.identity
            self._send(slot, MSG_KEY, self._next(), U32.pack(key.id) + text(key.identity), (key.fd,))

    def _take_key(self, slot, key_id) -> None:
        if slot.keys.pop(key_id, None) is not None:
            self._send(slot, MSG_KEY_FORGET, self._next(), U32.pack(key_id))

    def _identities(self, slot) -> set:
        return {self._pods[handle].identity for handle in slot.served if handle in self._pods}

    def _settle_keys(self, slot) -> None:
        """After a change of what it serves."""
        identities = self._identities(slot)
        for key_id, identity in list(slot.keys.items()):
            if identity not in identities:
                self._take_key(slot, key_id)
        for key in self._keys.all():
            if key.identity in identities:
                self._give_key(slot, key)

    def key_made(self, key) -> None:
        for slot in self.slots:
            if key.identity in self._identities(slot):
                self._give_key(slot, key)

    def key_forgotten(self, key_id) -> None:
        for slot in self.slots:
            self._take_key(slot, key_id)

    def identify(self, pod) -> None:
        """The pod has another identity than before."""
        for slot in self.slots:
            if pod.handle in slot.served:
                self._settle_keys(slot)

    def _balance(self, slot) -> None:
        """Pods to a worker that is new, until no other has two more than it."""
        while True:
            most = max((other for other in self.slots if other.state == READY), key=lambda other: len(other.pods))
            if len(most.pods) < len(slot.pods) + 2:
                return
            pod = next(reversed(most.pods.values()))
            self.detach(pod)
            self._give(pod, slot)

    def _make_sockets(self, slot, sequence, handle, family, count) -> None:
        pod = self._pods.get(handle)
        made, short = [], ""
        if family not in (4, 6):
            raise Malformed(f"sockets of family {family}")
        if slot.link.waiting > 16:
            return                                  # it does not read those it asked for before
        count = slot.allowed(min(count, SOCKETS_MAX))
        if pod is None or handle not in slot.served:
            pass                                    # it may have been deleted on the way; the answer is none
        elif count == 0:
            short = "it asks for more than it may have in a second"
        else:
            try:
                made, short = sockets_in(self._home, pod.netns, family, count)
            except PodError as error:
                short = str(error)
        if short and slot.may_complain():
            log("warning", f"worker {slot.index} gets {len(made)} of {count} sockets for pod {pod.uid}: {short}",
                worker=slot.index, pod=pod.uid)
        try:
            self._send(slot, MSG_SOCKETS, sequence, U32.pack(handle) + bytes((family,)), tuple(made))
        finally:
            close_all(made)

    # ---- transactions ------------------------------------------------------------------------------------------

    def commit(self, transaction, int fd, done) -> bool:
        """Takes `fd` (-1: nothing of it is for workers). False: too many wait, and nothing was taken."""
        if len(self._commits) >= COMMITS_MAX:
            return False
        commit = Commit(transaction, fd, done)
        self._commits.append(commit)
        self._advance()
        return True

    def _advance(self) -> None:
        """Begins the next transaction when none is on its way and somebody can take it."""
        while self._commit is None and self._commits:
            commit = self._commits[0]
            try:
                self._table.check(commit.transaction)
            except blobs.Refused as refused:
                self._commits.popleft()
                commit.close()
                commit.done((False, str(refused)))
                continue
            if commit.fd < 0:
                self._commits.popleft()
                self._table.store(commit.transaction)
                commit.close()
                commit.done(None)
                continue
            awaited = {slot for slot in self.slots if slot.state == READY}
            if not awaited:
                if commit.timer is None:
                    commit.timer = self._loop.later(AWAY_SECONDS, lambda: self._give_up(commit))
                return
            self._commits.popleft()
            self._commit = commit
            if commit.timer is not None:
                commit.timer.cancel()
            commit.sequence = self._next()
            self._await(commit, awaited)

    def _give_up(self, commit) -> None:
        self._commits.remove(commit)
        commit.close()
        commit.done((True, f"no worker is ready; it was waited for {AWAY_SECONDS:.0f} s. The keeper's log says why workers end"))
        self._advance()

    def _await(self, commit, set awaited) -> None:
        if commit.timer is not None:
            commit.timer.cancel()
        commit.awaited = awaited
        commit.timer = self._loop.later(COMMIT_SECONDS, lambda: self._late(commit))
        for slot in awaited:
            self._send(slot, MSG_COMMIT, commit.sequence, b"", (commit.fd,))

    def _answered(self, slot, sequence, txn_id, failure) -> None:
        commit = self._commit
        if commit is not None and sequence == commit.sequence and slot in commit.awaited:
            commit.awaited.discard(slot)
            commit.answers[slot] = failure
            commit.untaken = commit.untaken or (failure is not None and txn_id == 0)
            self._conclude()
        elif failure is not None and txn_id == 0:
            self._replace(slot, f"could not take what it was given: {failure}")
        elif failure is not None:                   # its snapshot, or what came into force while it started
            self._replace(slot, f"refuses what is in force (transaction {txn_id}): {failure}")

    def _settle(self, slot) -> None:
        """A worker that may be awaited died."""
        commit = self._commit
        if commit is not None:
            commit.awaited.discard(slot)
            commit.answers.pop(slot, None)
            self._conclude()

    def _late(self, commit) -> None:
        late, commit.awaited = commit.awaited, set()
        for slot in late:
            self._replace(slot, f"did not apply transaction {commit.transaction.id} within {COMMIT_SECONDS:.0f} s")
            commit.answers[slot] = "late"
        self._conclude()

    def _conclude(self) -> None:
        commit = self._commit
        if commit.awaited:
            return
        in_force = None in commit.answers.values()
        if in_force:
            newly = {slot for slot in self.slots if slot.state == READY and slot not in commit.answers}
            if newly:                               # became ready meanwhile
                return self._await(commit, newly)
        self._commit = None
        result = None
        refused = {slot: failure for slot, failure in commit.answers.items() if failure not in (None, "late")}
        if in_force:
            self._table.store(commit.transaction)
            for slot, failure in refused.items():
                self._replace(slot, f"refuses transaction {commit.transaction.id}, which is in force: {failure}")
            for slot in self.slots:
                if slot.state == STARTED:
                    self._send(slot, MSG_COMMIT, commit.sequence, b"", (commit.fd,))
        elif refused:
            result = (commit.untaken, next(iter(refused.values())))
        else:
            result = (True, f"no worker answered to transaction {commit.transaction.id}; they are replaced")
        commit.close()
        commit.done(result)
        self._advance()

    # ---- the end -----------------------------------------------------------------------------------------------

    def drain(self, int milliseconds, done) -> None:
        """No listener any more; `done` when every worker ended, at the latest a second after the time."""
        self._drained = done
        self.ending = True
        for slot in self.slots:
            if slot.retry is not None:
                slot.retry.cancel()
            if slot.state == READY:
                slot.state = DRAINING
                slot.watch.cancel()
                self._send(slot, MSG_DRAIN, self._next(), U32.pack(milliseconds))
            elif slot.state == STARTED:
                slot.kill()
        self._loop.later(milliseconds / 1000 + 1.0, self.kill)
        self._check_drained()

    def kill(self) -> None:
        self.ending = True
        for slot in self.slots:
            slot.kill()

    def _check_drained(self) -> None:
        if self._drained is not None and all(slot.state == DOWN for slot in self.slots):
            done, self._drained = self._drained, None
            done()

    def close(self) -> None:
        for slot in self.slots:
            slot.close()

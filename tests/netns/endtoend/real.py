"""What the tests with real programs ask of a lab: traffic in a client pod, lines of the access log, a worker's memory."""
from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.support.lab import NARROWS, Lab
from tests.support.wait import until

HERE = Path(__file__).parent
PYTHON = "/usr/bin/python3"
RUN = Path("/run/narrows/lab")


def play(lab: Lab, name: str, *args: object, pod: str = "client") -> Any:
    """Runs `name` of traffic.py in the pod; what it found."""
    done = lab.exec(pod, PYTHON, str(HERE / "traffic.py"), name, *map(str, args), timeout=90)
    return json.loads(done.stdout)


def play_lines(lab: Lab, lines: list[str], name: str, *args: object, pod: str = "client") -> Any:
    """Likewise, with lines on its stdin."""
    done = subprocess.run([NARROWS, "lab", "exec", "--name", lab.name, pod, "--", PYTHON, str(HERE / "traffic.py"), name,
                           *map(str, args)], input="\n".join(lines), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def curl(lab: Lab, *args: str, pod: str = "client") -> str:
    """`code version` of each answer."""
    discard = [word for arg in args if "://" in arg for word in ("-o", "/dev/null")]  # one for each URL
    return lab.exec(pod, "curl", "-sS", "-m", "15", *discard, "-w", "%{http_code} %{http_version}\n", *args,
                    check=False).stdout.strip()


def descriptors(pid: int, soft: int) -> None:
    """Sets how many a worker may have, as the worker's own user: another's limits are not even root's everywhere."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    user, group = fields["Uid"].split()[0], fields["Gid"].split()[0]
    subprocess.run(["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--",
                    "prlimit", f"--pid={pid}", f"--nofile={soft}:"], check=True, capture_output=True, timeout=10)


def soft_bound(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files"))
    return int(line.split()[3])


class Log:
    """The access log's lines of both nodes of what begins from now on: lines of an earlier request may still come."""

    def __init__(self, lab: Lab) -> None:
        self.files = {path: path.stat().st_size for path in sorted((RUN / lab.name / "nodes").glob("*/access.log"))}
        assert len(self.files) == 2
        since = datetime.now(UTC)
        self.since = since.strftime("%Y-%m-%dT%H:%M:%S.") + f"{since.microsecond // 1000:03d}Z"
        # a worker reads its clock once a turn: what begins in the turn that is under way must not look older
        until(lambda: datetime.now(UTC) - since > timedelta(milliseconds=50), "the turn under way is over")

    def lines(self, reporter: str, **fields: object) -> list[dict[str, Any]]:
        found = []
        for path, start in self.files.items():
            with path.open("rb") as file:
                file.seek(start)
                for line in file.read().splitlines(keepends=True):
                    record = json.loads(line) if line.endswith(b"\n") else {}
                    if record.get("start_time", "") < self.since:
                        continue
                    if record.get("reporter") == reporter and all(record.get(key) == value for key, value in fields.items()):
                        found.append(record)
        return found

    def one(self, reporter: str, **fields: object) -> dict[str, Any]:
        """The one line that has these fields, waited for."""
        found = until(lambda: self.lines(reporter, **fields), f"a line of the {reporter} with {fields}")
        assert len(found) == 1, found
        return found[0]

    def outcome(self, reporter: str, **fields: object) -> tuple[int, str, str]:
        line = self.one(reporter, **fields)
        return line["response_code"], line["response_flags"], line["response_code_details"]


def memory(lab: Lab) -> dict[int, int]:
    """Resident KiB of each worker that are its own: the log ring and the counters are shared and bounded."""
    found = {}
    for pid in lab.processes("ext.proxy.worker"):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[pid] = int(fields["RssAnon"].split()[0])
    assert found
    return found


def counted(lab: Lab, **labels: str) -> dict[tuple[str, str, str], float]:
    """istio_requests_total by reporter, code and flags."""
    found: dict[tuple[str, str, str], float] = {}
    for name, have, value in lab.samples():
        if name == "istio_requests_total" and all(have.get(key) == want for key, want in labels.items()):
            key = have["reporter"], have["response_code"], have["response_flags"]
            found[key] = found.get(key, 0) + value
    return found


def more(before: dict[tuple[str, str, str], float], after: dict[tuple[str, str, str], float]) -> dict[tuple[str, str, str], float]:
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}

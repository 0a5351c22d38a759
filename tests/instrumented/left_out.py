"""A pytest plugin (-p tests.instrumented.left_out): tests that an instrumented run leaves out, each with its reason, counted and told.

NARROWS_INSTRUMENTED says which run it is. A line that names no collected test of a collected file is an error: the list would rot.
"""
from __future__ import annotations

import os

import pytest

# run -> (file, test without parameters, or "" for the whole file) -> why
LEFT_OUT: dict[str, dict[tuple[str, str], str]] = {
    "address": {
        ("tests/unit/keeper/test_keys.py", "test_the_secret_is_nowhere_but_in_sealed_memory_that_is_locked_and_not_dumped"):
            "a sanitizer's runtime makes nothing of mlock",
        ("tests/unit/route/test_route_oracle.py", "test_any_request_finds_the_route_that_the_rules_say"):
            "takes ten minutes; `make fuzz` tries transactions under the same sanitizers",
        ("tests/netns/proxy/test_http_ends.py", "test_a_thousand_requests_leave_nothing_behind"): "measures memory: what was freed is kept",
        ("tests/netns/hbone/test_floods.py", "test_handshakes_that_stall_are_bounded_and_keep_nobody_out"):
            "measures memory: what was freed is kept",
        ("tests/netns/endtoend/test_http_real.py", "test_a_known_mix_is_counted_exactly_by_both_sides_and_costs_no_memory"):
            "measures memory: what was freed is kept",
        ("tests/netns/proxy/test_tcp.py", "test_a_silent_connection_that_finds_no_server_keeps_nothing_of_the_configuration"):
            "measures memory: what was freed is kept",
        ("tests/netns/keeper/test_pods.py", "test_a_real_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
        ("tests/unit/keeper/test_keeper.py", "test_a_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
        ("tests/netns/keeper/test_confinement.py", ""): "workers are not confined where a sanitizer is loaded",
    },
    "thread": {
        ("tests/unit/keeper/test_keys.py", "test_a_key_never_leaves_with_an_answer"):
            "reads all memory of its own process, of which the sanitizer maps terabytes",
        ("tests/netns/proxy/test_http_ends.py", "test_a_thousand_requests_leave_nothing_behind"): "measures memory: shadows of it are kept",
        ("tests/netns/proxy/test_starvation.py", "test_a_pod_that_opens_and_never_reads_holds_its_share_of_buffers"):
            "measures memory: shadows of it are kept",
        ("tests/netns/hbone/test_floods.py", "test_handshakes_that_stall_are_bounded_and_keep_nobody_out"):
            "measures memory: shadows of it are kept",
        ("tests/netns/keeper/test_confinement.py", ""): "workers are not confined where a sanitizer is loaded",
        ("tests/unit/keeper/test_keys.py", "test_the_secret_is_nowhere_but_in_sealed_memory_that_is_locked_and_not_dumped"):
            "a sanitizer's runtime makes nothing of mlock",
        ("tests/netns/keeper/test_pods.py", "test_a_real_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
        ("tests/unit/keeper/test_keeper.py", "test_a_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
    },
    "coverage": {
        ("tests/unit/sys/test_seccomp.py", "test_no_sanitizer_is_loaded_here_so_workers_are_confined"):
            "workers are not confined: counters are files",
        ("tests/netns/keeper/test_confinement.py", ""): "workers are not confined: counters are files",
        ("tests/netns/proxy/test_control.py", "test_a_worker_has_no_privilege_left"): "counts threads, of which one writes counters here",
        ("tests/netns/keeper/test_pods.py", "test_a_real_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
        ("tests/unit/keeper/test_keeper.py", "test_a_worker_killed_with_9_is_replaced_in_under_200_ms"): "measures time",
    },
}


class LeftOut:
    def __init__(self, reasons: dict[tuple[str, str], str]) -> None:
        self.reasons = reasons
        self.counts = dict.fromkeys(reasons, 0)

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take away what is looked for below
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        files = set()
        single = any("::" in word for word in config.args)
        for item in items:
            file, _, name = item.nodeid.partition("::")
            files.add(file)
            test = name.partition("[")[0].rpartition("::")[2]
            found = next((key for key in ((file, test), (file, "")) if key in self.reasons), None)
            if found is None:
                kept.append(item)
            else:
                left.append(item)
                self.counts[found] += 1
        stale = [f"{file}::{test}" for (file, test), count in self.counts.items() if file in files and not count and not single]
        if stale:
            raise pytest.UsageError(f"tests/instrumented/left_out.py names what is not there: {', '.join(stale)}")
        config.hook.pytest_deselected(items=left)
        items[:] = kept

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"left out: {sum(self.counts.values())} tests")
        for (file, test), count in self.counts.items():
            if count:
                terminalreporter.write_line(f"{count:>4}  {file}{'::' + test if test else ''}: {self.reasons[file, test]}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(LEFT_OUT[os.environ["NARROWS_INSTRUMENTED"]]), "left_out")

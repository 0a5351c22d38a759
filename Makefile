# The one front door: what CI runs is what a person runs. `make` alone lists the targets.
SHELL := /bin/sh
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
SANITIZE ?= address,undefined
# meson calls `cython` by name when an import rebuilds what changed
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup demo test test-unit test-netns test-bpf test-ebpf test-mixed test-kubernetes test-sanitize coverage fuzz lint build bench soak clean

help:
	@echo "make demo        bring up Bookinfo in a mesh on this machine, show what it sees (root)"
	@echo "make test        lint, then every test (root)"
	@echo "make test-unit   tests that need no privilege"
	@echo "make test-netns  tests with real namespaces, rules and processes (root)"
	@echo "make test-bpf    the BPF tool chain: compile and load (root)"
	@echo "make test-ebpf   tests in which pods are captured, once more with hooks instead of redirects: EBPF= (root)"
	@echo "make test-mixed  a part of them with hooks in one direction and redirects in the other, both ways (root)"
	@echo "make test-kubernetes  against the real API server and controllers, which it builds once a machine: about ten minutes (root)"
	@echo "make test-sanitize  ext/ and its processes under AddressSanitizer and UBSan, or SANITIZE=thread (root; tests/README.md)"
	@echo "make coverage    lines of ext/ that run in tests, by file; fails below 90 % (root)"
	@echo "make bench       our proxy beside Envoy, HAProxy and nginx: CASES= PROXIES= ROUNDS= SECONDS= OPENSSL= (root; tests/bench/README.md)"
	@echo "make fuzz        libFuzzer with sanitizers on parsers, tables, tunnels and whole connections, FUZZ_SECONDS=60 each"
	@echo "make soak        half an hour under load while routes, pods and workers come and go: MINUTES= (root)"
	@echo "make lint        ruff, mypy --strict, cython-lint"
	@echo "make build       compile the extension"
	@echo "make setup       apt packages, .venv, kernel headers, extension; skips what is done"
	@echo "make clean       remove what was built (not .venv); make distclean removes .venv too"

setup:
	@test -x /usr/bin/python3 || { echo "setup: installing python3"; apt-get update -q && apt-get install -q -y --no-install-recommends python3 || { echo "setup: /usr/bin/python3 is missing and could not be installed: run as root on Debian 12 or 13, or install python3" >&2; exit 69; }; }
	@/usr/bin/python3 tools/setup.py

build: setup
	@.venv/bin/ninja -C build

demo: setup
	@$(PY) -m examples.bookinfo.demo

test: lint test-unit test-bpf test-netns test-ebpf test-mixed fuzz

test-unit: setup
	$(PYTEST) tests/unit

test-bpf: setup
	$(PYTEST) tests/bpf

test-netns: setup
	$(PYTEST) tests/netns

# what of labs does not hang on how a pod is captured is left to EBPF=tests/netns
EBPF = $(addprefix tests/netns/,agent dns proxy hbone strict $(addprefix lab/test_,mesh.py one_node.py policy.py tunnels.py) \
	$(addprefix endtoend/test_,capture_real.py tcp_real.py real_programs.py))

test-ebpf: setup
	NARROWS_TEST_CAPTURE=ebpf $(PYTEST) $(EBPF)

MIXED = $(addprefix tests/netns/,agent/test_life.py agent/test_reuse.py $(addprefix proxy/test_,tcp.py ipv6.py near.py near_policy.py two_workers.py))

test-mixed: setup
	NARROWS_TEST_CAPTURE=ebpf+iptables $(PYTEST) $(MIXED)
	NARROWS_TEST_CAPTURE=iptables+ebpf $(PYTEST) $(MIXED)

# not a part of `make test`: its set-up compiles Kubernetes
test-kubernetes: setup
	@/usr/bin/python3 tools/kubernetes.py
	NARROWS_TEST_APISERVER=built $(PYTEST) tests/unit/kubernetes/test_contract.py tests/kubernetes

test-sanitize: setup
	@$(PY) tests/instrumented/sanitize.py --sanitize $(SANITIZE)

coverage: setup
	@$(PY) tests/instrumented/coverage.py --missing

bench: setup
	@$(PY) -m tests.bench --cases "$(CASES)" --proxies "$(PROXIES)" $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(OUT),--out $(OUT)) $(if $(OPENSSL),--openssl $(OPENSSL))

fuzz: setup
	$(PY) tests/fuzz/run.py

soak: setup
	@$(PY) -m tests.bench.soak $(if $(MINUTES),--minutes $(MINUTES))

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/cython-lint ext tests/fuzz

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
	rm -f .venv/narrows-setup.json

distclean: clean
	rm -rf .venv .cache

# What each target does is in its `##` comment; `make help` prints them. All are idempotent.
NEXTEST_VERSION := 0.9.143
DENY_VERSION := 0.20.2
SCHEMATHESIS_VERSION := 4.32.5
SEEDS ?= 1
SOAK_ARGS ?=
BENCH_ARGS ?=
CARGO_HOME ?= $(HOME)/.cargo
export PATH := $(CARGO_HOME)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test setup setup-build build guest bench soak verify fix audit fuzz

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: setup-build guest ## bring up three nodes, warm a Python template on one, run 300 tasks on all, check their sum, leave the cluster running
	@echo "building  (the first time some minutes: all dependencies; later seconds)"
	@cargo build --quiet --release --package farfork
	@./deploy/demo.sh

test: setup guest verify ## install what the tests need, then run every check and every test (what CI runs)
	@if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then \
		cargo nextest run --workspace --all-features; \
	else \
		echo "SKIPPED: every test of machines (crates/vm/tests/it, and in cluster/tests/node real and all named real_), since /dev/kvm is missing or not for this user:"; \
		echo "load kvm_intel or kvm_amd, and join the group that owns /dev/kvm (usually kvm)"; \
		cargo nextest run --workspace --all-features -E 'not (binary(it) or test(/(^|::)real(::|_)/))'; \
	fi

setup-build: ## install what the build needs (a C compiler, libclang)
	@./deploy/setup.sh build

setup: ## install what the build and the tests need: a C compiler, libclang, cargo-nextest, schemathesis
	@NEXTEST_VERSION=$(NEXTEST_VERSION) SCHEMATHESIS_VERSION=$(SCHEMATHESIS_VERSION) ./deploy/setup.sh build test

build: setup-build ## build everything, optimised
	cargo build --release --workspace

guest: setup-build ## build kernel, agent and root file systems of Linux guests into a cache (docs/guests.md)
	@./deploy/guest/build.sh

bench: setup-build ## measure the floor and the rows of the specification, local, remote, cluster and Linux, into target/bench (BENCH_ARGS=--quick)
	@mkdir -p target/bench
	cargo run --quiet --release --package farfork-bench -- floor --json target/bench/floor.json
	cargo run --quiet --release --package farfork-bench -- local --json target/bench/local.json $(BENCH_ARGS)
	cargo run --quiet --release --package farfork-bench -- workers --json target/bench/workers.json $(BENCH_ARGS)
	cargo build --quiet --release --package farfork
	cargo run --quiet --release --package farfork-bench -- node --json target/bench/node.json $(BENCH_ARGS)
	./deploy/guest/build.sh
	cargo run --quiet --release --package farfork-bench -- linux --json target/bench/linux.json --template target/bench/python.img $(BENCH_ARGS)
	cargo run --quiet --release --package farfork-bench -- cluster --json target/bench/cluster.json --template target/bench/python.img $(BENCH_ARGS)
	@rm -f target/bench/python.img
	@# Its children touch memory by command, which takes a build of its own.
	cargo build --quiet --release --package farfork --features farfork/bench --target-dir target/for-bench
	cargo run --quiet --release --package farfork-bench -- remote --json target/bench/remote.json \
		--farfork target/for-bench/release/farfork $(BENCH_ARGS)
	cargo run --quiet --release --package farfork-bench -- report target/bench

soak: setup guest ## the same tests with their full counts, by seed, resumable; writes target/soak/soak.json (SEEDS=1 SOAK_ARGS="--only TEXT")
	cargo xtask soak --seeds $(SEEDS) $(SOAK_ARGS)

verify: setup-build ## check format, lints, import rules, unsafe islands, file lengths, links, licences; changes nothing
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- --deny warnings
	cargo clippy --quiet --workspace --all-targets --all-features -- --deny warnings
	cargo xtask verify

fix: setup-build ## format, and apply what clippy can
	cargo clippy --quiet --workspace --all-targets --all-features --fix --allow-dirty --allow-staged
	cargo fmt --all

audit: setup-build ## cargo-deny: bans, licences, sources, and advisories where their database can be reached
	@command -v cargo-deny >/dev/null || cargo install --locked --version $(DENY_VERSION) cargo-deny
	cargo deny --all-features check bans licenses sources
	@if cargo deny fetch db; then cargo deny --all-features check advisories; \
	else echo "advisories: NOT CHECKED: their database cannot be fetched from here"; fi

fuzz: setup-build ## fuzz every parser of bytes from outside for FUZZ_SECONDS each, starting from the corpora in fuzz/corpus
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) ./fuzz/run.sh

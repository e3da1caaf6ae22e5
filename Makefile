# make demo   set everything up and back a running VM up, end to end; takes everything down
# make test   set everything up and run all tests
# make up     a private cluster and hypervisor, left running for you to try your own YAML; make down ends it

cache := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtmark
export CARGO_TARGET_DIR ?= $(cache)/target
bed := $(CARGO_TARGET_DIR)/debug/bed
export VIRTMARK_PYTHON := $(cache)/venv/bin/python

.PHONY: demo test up down build lint prerequisites

demo: build
	$(bed) demo

up: build
	$(bed) --hypervisors 2 up

down:
	[ ! -x $(bed) ] || $(bed) down

# lint first: it is fast, and what it says is cheap to mend
test: lint
	cargo build --locked --workspace --features virtmark/killpoints
	$(bed) build --guest
	$(bed) --hypervisors 2 run -- cargo test --locked --workspace --features virtmark/killpoints

lint: prerequisites
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features virtmark/killpoints -- -D warnings
	cargo clippy --locked --no-default-features --bin operator --bin generate -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
	cargo run --locked --quiet --bin generate -- --check

build: prerequisites
	cargo build --locked --workspace

prerequisites:
	@bed/prerequisites.sh

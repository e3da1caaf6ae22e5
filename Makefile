# make demo   set everything up and back a running VM up, end to end; takes everything down
# make test   set everything up and run all tests
# make e2e    users' stories on a real cluster: two nodes with kubelets, the images, the chart
# make fuzz   hostile input, guided by coverage: N inputs for each target, or for TARGET (docs/hostile-input.md)
# make soak   random histories of real VMs, N of them: every restore point is compared byte for byte
# make bench  measure the data path against nbdcopy and the stock ovirt-imageio; docs/benchmarks.md says what the rows mean
# make bench-incremental  an incremental backup from apply to Succeeded beside virtnbdbackup; what 100 and 1,000 VMs cost
# make book   the pages of docs/ as a book, in target/book
# make up     a private cluster and hypervisor, left running for you to try your own YAML; make down ends it

cache := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtmark
export CARGO_TARGET_DIR ?= $(cache)/target
bed := $(CARGO_TARGET_DIR)/debug/bed
export VIRTMARK_PYTHON := $(cache)/venv/bin/python

.PHONY: demo test test-longest test-survival test-cluster test-others e2e soak bench bench-incremental book fuzz up down build lint style prerequisites

demo: build
	$(bed) --hypervisors 2 demo

up: build
	$(bed) --hypervisors 2 up

down:
	[ ! -x $(bed) ] || $(bed) down

# style first: it is fast, and what it says is cheap to mend. Then beds, two at a time: the tests of survival kill what all
# others share, one after the other, and mostly wait. The longest are first, and none is long, so that both cores have work to
# the end
cargo_test := cargo test --no-fail-fast --locked --workspace --features virtmark/killpoints
tests := $(patsubst %/main,%,$(basename $(wildcard tests/*.rs tests/*/main.rs bed/tests/*.rs)))
longest := kills::a_backup_survives outages::
others := --lib --bins --examples $(addprefix --test ,$(filter-out survival cluster client,$(notdir $(tests))))

# the tests' own build has the processes too: `cargo build` and `cargo run` would build other features of the dependencies
test: style
	$(cargo_test) --no-run
	$(CARGO_TARGET_DIR)/debug/generate --check
	$(bed) build --guest
	$(MAKE) --jobs=2 --output-sync=target test-longest test-survival test-others test-cluster

test-longest:
	$(bed) --hypervisors 2 run -- $(cargo_test) --test survival -- $(longest)

test-survival:
	$(bed) --hypervisors 2 run -- $(cargo_test) --test survival -- $(addprefix --skip ,$(longest))

test-cluster:
	$(bed) --hypervisors 2 run -- $(cargo_test) --test cluster --test client

test-others:
	$(bed) --hypervisors 2 run -- $(cargo_test) $(others)

# the images' binaries are what is shipped: optimized, and the operator without libvirt
e2e:
	@bed/prerequisites.sh containerd runc containernetworking-plugins buildah conntrack iptables iproute2 procps binutils
	$(cargo_test) --no-run --test e2e --bin bed
	$(bed) build --nodes
	cargo build --locked --release --no-default-features --bin operator
	cargo build --locked --release --bin agent
	$(bed) --hypervisors 2 nodes --binaries $(CARGO_TARGET_DIR)/release -- \
	  $(cargo_test) --test e2e -- --test-threads 1 --nocapture

soak: N = 300
soak: prerequisites
	cargo build --locked --workspace --features virtmark/killpoints
	$(bed) --hypervisors 2 run -- env N=$(N) cargo test --locked --features virtmark/killpoints --test truth -- \
	  --nocapture every_restore_point

# e.g. make bench BENCH="--only https --rounds 3"
bench: prerequisites
	cargo build --locked --release --example image_server --example data_path
	$(CARGO_TARGET_DIR)/release/examples/data_path --bench --json $(CARGO_TARGET_DIR)/bench.json $(BENCH)

# e.g. make bench-incremental BENCH="--only incremental --rounds 3"
bench-incremental:
	@bed/prerequisites.sh virtnbdbackup
	cargo build --locked --release --workspace --bins --example incremental
	$(CARGO_TARGET_DIR)/release/bed run -- \
	  $(CARGO_TARGET_DIR)/release/examples/incremental --json $(CARGO_TARGET_DIR)/bench-incremental.json $(BENCH)

# mdBook is built once, into the cache. What can be checked of the pages `make test` checks, without it (tests/book)
mdbook := $(cache)/mdbook-0.5.4
book: $(mdbook)/bin/mdbook
	$< build

$(mdbook)/bin/mdbook:
	CARGO_TARGET_DIR=$(mdbook)/target cargo install mdbook --version 0.5.4 --locked --no-default-features --features search \
	  --root $(mdbook)
	rm -r $(mdbook)/target

lint: style
	cargo run --locked --quiet --bin generate -- --check

style: prerequisites
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features virtmark/killpoints -- -D warnings
	cargo clippy --locked --no-default-features --bin operator --bin generate --bin virtmark -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

# libFuzzer on the stable toolchain: rustc's own LLVM has the instrumentation, libfuzzer-sys the rest
N ?= 100000
TARGET ?= $(notdir $(wildcard fuzz/corpus/*))
fuzz_flags := -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters \
  pc-table trace-compares) --cfg fuzzing
fuzz_target_dir := $(CARGO_TARGET_DIR)-fuzz
fuzz_triple := $(shell rustc -vV | sed -n 's/^host: //p')

# what is found new stays in the folder work, what breaks a property in the folder findings
fuzz: prerequisites
	cd fuzz && RUSTFLAGS="$(fuzz_flags)" CARGO_TARGET_DIR=$(fuzz_target_dir) \
	  cargo build --locked --release --target $(fuzz_triple)
	set -e; for target in $(TARGET); do echo "== $$target"; \
	  mkdir -p $(fuzz_target_dir)/work/$$target $(fuzz_target_dir)/findings; \
	  VIRTMARK_FUZZ=$$target $(fuzz_target_dir)/$(fuzz_triple)/release/virtmark-fuzz -runs=$(N) -max_len=4096 \
	    -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix=$(fuzz_target_dir)/findings/$$target- \
	    $(fuzz_target_dir)/work/$$target fuzz/corpus/$$target; done

build: prerequisites
	cargo build --locked --workspace

prerequisites:
	@bed/prerequisites.sh

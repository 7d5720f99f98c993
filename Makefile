.DEFAULT_GOAL := help
.PHONY: help setup servers demo test lint fmt doc sim fuzz bench

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust 1.88 or later, with rustfmt and clippy (https://rustup.rs, or the package rustup)"; exit 1; }

servers:
	@tests/services/install

demo: setup ## the main job, told as a story; on Redis where FLEETCACHE_REDIS names one
	@cargo run --quiet --package fleetcache-examples --bin demo

test: setup servers ## everything: lints, documentation, all tests, the simulation, the demo
	@.ci/all

lint: setup ## formatting and lints
	cargo fmt --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	cargo clippy --package fleetcache --no-default-features -- -D warnings

fmt: setup ## repair formatting
	cargo fmt

doc: setup ## the reference, into target/doc
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --package fleetcache --all-features

sim: setup ## a long simulation; FLEETCACHE_SIM_OPS operations (10^8), FLEETCACHE_SIM_SEED replays one history
	FLEETCACHE_SIM_OPS=$${FLEETCACHE_SIM_OPS:-100000000} cargo test --release --package fleetcache-tests --test simulation -- --nocapture

fuzz: setup ## looks for bytes that break the decoders of what servers hand over; FLEETCACHE_FUZZ_SECONDS (600)
	@fuzz/run

bench: setup servers ## speed against the bare engines and the peers, as ratios
	cd benches && cargo run --release

# vdmount. `make help` lists the targets; `make demo` and `make test` need nothing else first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PREFIX  ?= /usr/local
DESTDIR ?=
SWIFT   ?= swift
SWIFT_MINIMUM := 6.2

# What building, testing, the demo and the benchmark need from Debian. Swift itself is not among it: see check-swift.
PACKAGES := \
    make gcc g++ pkg-config git ca-certificates \
    libfuse3-dev fuse3 libdeflate-dev \
    qemu-utils qemu-system-common libvmdk-utils \
    fdisk parted gdisk btrfs-progs dosfstools exfatprogs f2fs-tools ntfs-3g cryptsetup-bin genisoimage squashfs-tools \
    fio e2fsprogs xfsprogs mount util-linux procps strace python3 xz-utils

BINARIES := vdmount vdumount vdimg
SOURCE_TREES := Sources Tests Package.swift

# Targets import only what they declare.
BUILD_FLAGS   := --explicit-target-dependency-import-check error
RELEASE_FLAGS := $(BUILD_FLAGS) -c release --static-swift-stdlib
RELEASE_BIN   := .build/release
# The tests run optimised code, as it is shipped; beside the release build, whose linking differs.
TEST_FLAGS    := $(BUILD_FLAGS) -c release -Xswiftc -enable-testing --scratch-path .build/tests

# Runs as root what needs root: directly, through sudo, or not at all, saying why.
define as_root
if [ "$$(id -u)" = 0 ]; then run=(env); \
elif command -v sudo >/dev/null; then run=(sudo -E env "PATH=$$PATH"); \
else echo "make $@: $(1) needs root, and there is no sudo here: run it as root." >&2; exit 1; fi
endef

.PHONY: all
all: build

## help: this list
.PHONY: help
help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST)) | awk -F': ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# ---- set-up -------------------------------------------------------------------------------------------------------

.PHONY: check-swift
check-swift:
	@need="vdmount: install Swift $(SWIFT_MINIMUM) or later from swift.org and put it on PATH"; \
	if ! command -v $(SWIFT) >/dev/null; then echo "$$need (there is no '$(SWIFT)' on PATH)." >&2; exit 1; fi; \
	have="$$($(SWIFT) --version 2>/dev/null | sed -n 's/.*Swift version \([0-9][0-9.]*\).*/\1/p' | head -n 1)" || true; \
	if [ -z "$$have" ]; then echo "$$need ('$(SWIFT) --version' does not name its version)." >&2; exit 1; fi; \
	if [ "$$(printf '%s\n' $(SWIFT_MINIMUM) "$$have" | sort -V | head -n 1)" != $(SWIFT_MINIMUM) ]; then \
	    echo "$$need (this is $$have)." >&2; exit 1; fi

## deps: install the Debian packages that building and testing need; does nothing when they are there
.PHONY: deps
deps: check-swift
	@if ! command -v dpkg-query >/dev/null; then \
	    if command -v pkg-config >/dev/null && pkg-config --exists fuse3 libdeflate; then exit 0; fi; \
	    echo "make deps: this is not a Debian system: install the equivalents of: $(strip $(PACKAGES))" >&2; exit 1; \
	fi; \
	missing=(); \
	installed="$$(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(PACKAGES) 2>/dev/null \
	    | sed -n 's/^installed //p')" || true; \
	for package in $(PACKAGES); do \
	    grep -qx -- "$$package" <<<"$$installed" || missing+=("$$package"); \
	done; \
	if [ "$${#missing[@]}" = 0 ]; then exit 0; fi; \
	$(call as_root,installing $${missing[*]}); \
	echo "make deps: installing with apt: $${missing[*]}"; \
	"$${run[@]}" apt-get update; \
	"$${run[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${missing[@]}"

# ---- building -----------------------------------------------------------------------------------------------------

## build: release binaries with the Swift runtime inside, in .build/release
.PHONY: build
build: check-swift
	@for binary in $(BINARIES); do $(SWIFT) build $(RELEASE_FLAGS) --product $$binary; done

## debug: debug binaries, in .build/debug
.PHONY: debug
debug: check-swift
	$(SWIFT) build $(BUILD_FLAGS)

## install: copy the release binaries and the documentation to PREFIX (/usr/local), below DESTDIR; after make build
.PHONY: install
install:
	@for binary in $(BINARIES); do \
	    if [ ! -x $(RELEASE_BIN)/$$binary ]; then \
	        echo "make install: $(RELEASE_BIN)/$$binary is missing: run 'make build' first." >&2; exit 1; fi; \
	done
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/doc/vdmount"
	install -m 755 $(BINARIES:%=$(RELEASE_BIN)/%) "$(DESTDIR)$(PREFIX)/bin/"
	install -m 644 README.md CHANGELOG.md LICENSE "$(DESTDIR)$(PREFIX)/share/doc/vdmount/"
	cp -r --no-preserve=all docs "$(DESTDIR)$(PREFIX)/share/doc/vdmount/"

## uninstall: remove what install put there
.PHONY: uninstall
uninstall:
	rm -f $(BINARIES:%="$(DESTDIR)$(PREFIX)/bin/%")
	rm -rf "$(DESTDIR)$(PREFIX)/share/doc/vdmount"

# ---- trying and testing -------------------------------------------------------------------------------------------

## demo: set up, build, and mount a VMDK snapshot chain
.PHONY: demo
demo: deps
	@$(MAKE) --no-print-directory build
	@Scripts/demo.sh

## test: set up, build, and run all tests (root, /dev/fuse and loop devices are used)
.PHONY: test
test: deps
	@$(call as_root,mounting and loop devices in the tests); \
	$(SWIFT) build $(TEST_FLAGS) --build-tests; \
	"$${run[@]}" $(SWIFT) test $(TEST_FLAGS) --skip-build

## torture: the power-cut and random tests, many times longer (VDMOUNT_TORTURE=1)
.PHONY: torture
torture: deps
	@$(call as_root,mounting and loop devices in the tests); \
	$(SWIFT) build $(TEST_FLAGS) --build-tests; \
	"$${run[@]}" VDMOUNT_TORTURE=1 $(SWIFT) test $(TEST_FLAGS) --skip-build

# Without what has one thread and would take the sanitizer an hour: replayed power cuts and hostile bytes.
## tsan: the tests of the libraries under the thread sanitizer
.PHONY: tsan
tsan: deps
	TSAN_OPTIONS="halt_on_error=1 $${TSAN_OPTIONS:-}" SWIFT_BACKTRACE=enable=no \
	$(SWIFT) test $(BUILD_FLAGS) --scratch-path .build/tsan --sanitize thread \
	    --skip MountTests --skip PowerCutTests --skip Hostile

## fuzz: libFuzzer with the address sanitizer on images and on partition tables, FUZZ_SECONDS=300 long each
.PHONY: fuzz
FUZZ_SECONDS ?= 300
FUZZ_CORPUS  ?= .build/fuzz-corpus
FUZZ_TARGETS ?= fuzz fuzz-partitions
fuzz: deps
	@if [ ! -f Tests/Fuzz/Package.swift ]; then echo "make fuzz: Tests/Fuzz/Package.swift is missing." >&2; exit 1; fi
	@for target in $(FUZZ_TARGETS); do \
	    $(SWIFT) build --package-path Tests/Fuzz --scratch-path .build/fuzz -c release \
	        --sanitize fuzzer --sanitize address -Xswiftc -parse-as-library \
	        -Xswiftc -sanitize-coverage=edge,inline-8bit-counters,pc-table,trace-cmp --product $$target; \
	    corpus=$(FUZZ_CORPUS)/$$target; \
	    python3 Tests/Fuzz/seeds.py $$target $$corpus; \
	    SWIFT_BACKTRACE=enable=no .build/fuzz/release/$$target -max_total_time=$(FUZZ_SECONDS) -malloc_limit_mb=64 \
	        -timeout=10 -max_len=600000 -artifact_prefix=$$corpus/ $(FUZZ_ARGS) $$corpus; \
	done

## bench: speed and memory beside a bare pass-through and qemu-storage-daemon; BENCH_ARGS="--quick" and others
.PHONY: bench
bench: deps
	@$(MAKE) --no-print-directory build
	@$(call as_root,mounting and loop devices in the benchmark); \
	"$${run[@]}" python3 Tests/Bench/bench.py --bin $(RELEASE_BIN) $(BENCH_ARGS)

# ---- the sources --------------------------------------------------------------------------------------------------

## format: lay out all Swift sources by .swift-format
.PHONY: format
format: check-swift
	$(SWIFT) format -i -r -p $(SOURCE_TREES)

## lint: what format would change, and the house rules (Scripts/tidy.sh)
.PHONY: lint
lint: check-swift
	$(SWIFT) format lint -s -r -p $(SOURCE_TREES)
	Scripts/tidy.sh

## check: lint, build and test
.PHONY: check
check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory build
	@$(MAKE) --no-print-directory test

## clean: remove what was built
.PHONY: clean
clean:
	rm -rf .build

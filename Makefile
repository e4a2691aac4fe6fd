# vdmount. `make help` lists the targets; `make demo` and `make test` need nothing else first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PREFIX  ?= /usr/local
DESTDIR ?=
# mount(8) looks for its helpers in /sbin, shells for completions where their distribution says.
UNIT_DIR ?= $(PREFIX)/lib/systemd/system
BASH_DIR ?= $(PREFIX)/share/bash-completion/completions
ZSH_DIR  ?= $(PREFIX)/share/zsh/site-functions
FISH_DIR ?= $(PREFIX)/share/fish/vendor_completions.d
SWIFT   ?= swift
SWIFT_MINIMUM := 6.2

# What building, testing, the demo and the benchmark need from Debian. Swift itself is not among it: see check-swift.
PACKAGES := \
    make gcc g++ pkg-config git ca-certificates \
    libfuse3-dev fuse3 libseccomp-dev libdeflate-dev libisal-dev libzstd-dev \
    libcurl4-openssl-dev libnbd-dev libiscsi-dev \
    qemu-utils qemu-system-common libvmdk-utils libvhdi-utils libqcow-utils \
    fdisk parted gdisk btrfs-progs dosfstools exfatprogs f2fs-tools ntfs-3g cryptsetup-bin genisoimage squashfs-tools \
    fio e2fsprogs xfsprogs mount util-linux procps strace python3 xz-utils zstd systemd \
    nbdkit tgt openssl

# What the Debian package needs on top: to build and lint it, and to try it in a Debian tree and on a booted machine.
DEB_PACKAGES  := build-essential debhelper lintian mandoc debootstrap
BOOT_PACKAGES := qemu-system-x86

BINARIES := vdmount vdumount vdimg
MOUNT_HELPERS := mount.vdmount umount.fuse.vdmount
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

# A test run is thousands of lines: what failed, and why, is said once more at its end. Takes further arguments.
TEST_LOG := .build/tests/last-run.log
define run_tests
if ! "$${run[@]}" $(2) $(SWIFT) test $(TEST_FLAGS) --skip-build $(1) 2>&1 | tee $(TEST_LOG); then \
    echo; echo "make $@: what failed (the whole is in $(TEST_LOG)):"; \
    grep -A 4 -E 'recorded an issue|error: |Fatal error' $(TEST_LOG) | cut -c 1-400 | grep -v ' started\.$$' | head -n 60; \
    exit 1; \
fi
endef

.PHONY: all
all: build

## help: this list
.PHONY: help
help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST)) | awk -F': ' '{ printf "  make %-13s %s\n", $$1, $$2 }'

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
	    if command -v pkg-config >/dev/null && pkg-config --exists fuse3 libseccomp libdeflate libisal libzstd \
	        libcurl libnbd libiscsi; then exit 0; fi; \
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

## install: copy programs, mount helpers, unit, manual and documentation to PREFIX (/usr/local); after make build
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
	rm -r "$(DESTDIR)$(PREFIX)/share/doc/vdmount/docs/man"
	install -d "$(DESTDIR)$(PREFIX)/share/man/man1" "$(DESTDIR)$(PREFIX)/share/man/man8"
	install -m 644 docs/man/*.1 "$(DESTDIR)$(PREFIX)/share/man/man1/"
	install -m 644 docs/man/*.8 "$(DESTDIR)$(PREFIX)/share/man/man8/"
	ln -sf vdmount.8 "$(DESTDIR)$(PREFIX)/share/man/man8/mount.vdmount.8"
	ln -sf vdumount.8 "$(DESTDIR)$(PREFIX)/share/man/man8/umount.fuse.vdmount.8"
	install -d "$(DESTDIR)$(PREFIX)/sbin" "$(DESTDIR)$(UNIT_DIR)" "$(DESTDIR)$(PREFIX)/share/doc/vdmount/examples"
	@for helper in $(MOUNT_HELPERS); do \
	    sed 's|@bindir@|$(PREFIX)/bin|' System/$$helper >"$(DESTDIR)$(PREFIX)/sbin/$$helper"; \
	    chmod 755 "$(DESTDIR)$(PREFIX)/sbin/$$helper"; \
	done
	sed 's|@bindir@|$(PREFIX)/bin|' System/vdmount@.service >"$(DESTDIR)$(UNIT_DIR)/vdmount@.service"
	install -m 644 System/example.conf "$(DESTDIR)$(PREFIX)/share/doc/vdmount/examples/"
	install -d "$(DESTDIR)$(BASH_DIR)" "$(DESTDIR)$(ZSH_DIR)" "$(DESTDIR)$(FISH_DIR)"
	@for binary in $(BINARIES); do \
	    generate=($(RELEASE_BIN)/$$binary --generate-completion-script); \
	    "$${generate[@]}" bash | sed '1{/^#!/d}' >"$(DESTDIR)$(BASH_DIR)/$$binary"; \
	    "$${generate[@]}" zsh >"$(DESTDIR)$(ZSH_DIR)/_$$binary"; \
	    "$${generate[@]}" fish >"$(DESTDIR)$(FISH_DIR)/$$binary.fish"; \
	done

## uninstall: remove what install put there
.PHONY: uninstall
uninstall:
	rm -f $(BINARIES:%="$(DESTDIR)$(PREFIX)/bin/%")
	rm -rf "$(DESTDIR)$(PREFIX)/share/doc/vdmount"
	rm -f $(MOUNT_HELPERS:%="$(DESTDIR)$(PREFIX)/sbin/%") "$(DESTDIR)$(UNIT_DIR)/vdmount@.service"
	rm -f $(patsubst docs/man/%,"$(DESTDIR)$(PREFIX)/share/man/man1/%",$(wildcard docs/man/*.1)) \
	    $(patsubst docs/man/%,"$(DESTDIR)$(PREFIX)/share/man/man8/%",$(wildcard docs/man/*.8)) \
	    $(MOUNT_HELPERS:%="$(DESTDIR)$(PREFIX)/share/man/man8/%.8")
	rm -f $(BINARIES:%="$(DESTDIR)$(BASH_DIR)/%") $(BINARIES:%="$(DESTDIR)$(ZSH_DIR)/_%") \
	    $(BINARIES:%="$(DESTDIR)$(FISH_DIR)/%.fish")

# ---- trying and testing -------------------------------------------------------------------------------------------

## demo: set up, build, and mount a VMDK snapshot chain
.PHONY: demo
demo: deps
	@$(MAKE) --no-print-directory build
	@Scripts/demo.sh

## documentation: the library's, by DocC, in .build/documentation; a link that leads nowhere is an error
.PHONY: documentation
documentation: deps
	@$(SWIFT) build $(TEST_FLAGS) --build-tests
	@Scripts/documentation.sh .build/tests/release .build/documentation

## test: set up, build, and run all tests (root, /dev/fuse and loop devices are used)
.PHONY: test
test: deps
	@$(call as_root,mounting and loop devices in the tests); \
	$(SWIFT) build $(TEST_FLAGS) --build-tests; \
	$(call run_tests)
	@Scripts/documentation.sh .build/tests/release .build/documentation
	@Tests/System/units.sh

## torture: the power-cut and random tests, many times longer (VDMOUNT_TORTURE=1)
.PHONY: torture
torture: deps
	@$(call as_root,mounting and loop devices in the tests); \
	$(SWIFT) build $(TEST_FLAGS) --build-tests; \
	$(call run_tests,,VDMOUNT_TORTURE=1)

## test-memory: two minutes of load on a machine short of memory, a control group of 256 MiB (root)
.PHONY: test-memory
test-memory: deps
	@$(call as_root,control groups and mounting in the test); \
	$(SWIFT) build $(TEST_FLAGS) --build-tests; \
	$(call run_tests,--filter MemoryPressureTests,VDMOUNT_TORTURE=1)

# Without what has one thread and would take the sanitizer an hour: replayed power cuts and hostile bytes.
## tsan: the tests of the libraries under the thread sanitizer
.PHONY: tsan
tsan: deps
	TSAN_OPTIONS="halt_on_error=1 $${TSAN_OPTIONS:-}" SWIFT_BACKTRACE=enable=no \
	$(SWIFT) test $(BUILD_FLAGS) --scratch-path .build/tsan --sanitize thread \
	    --skip MountTests --skip PowerCutTests --skip Hostile

## fuzz: libFuzzer with the address sanitizer on images, their changes, tables, caches, servers; FUZZ_SECONDS=300 each
.PHONY: fuzz
FUZZ_SECONDS ?= 300
FUZZ_CORPUS  ?= .build/fuzz-corpus
FUZZ_TARGETS ?= fuzz fuzz-change fuzz-partitions fuzz-cache fuzz-network
fuzz: deps
	@if [ ! -f Tests/Fuzz/Package.swift ]; then echo "make fuzz: Tests/Fuzz/Package.swift is missing." >&2; exit 1; fi
	@$(SWIFT) build --package-path Tests/Fuzz --scratch-path .build/fuzz -c release \
	    --sanitize fuzzer --sanitize address -Xswiftc -parse-as-library -Xswiftc -enable-testing \
	    -Xswiftc -sanitize-coverage=edge,inline-8bit-counters,pc-table,trace-cmp
	@for target in $(FUZZ_TARGETS); do \
	    corpus=$(FUZZ_CORPUS)/$$target; \
	    python3 Tests/Fuzz/seeds.py $$target $$corpus; \
	    SWIFT_BACKTRACE=enable=no .build/fuzz/release/$$target -max_total_time=$(FUZZ_SECONDS) -malloc_limit_mb=64 \
	        -timeout=10 -max_len=600000 -artifact_prefix=$$corpus/ $(FUZZ_ARGS) $$corpus; \
	done

## bench: speed and memory beside other programs, of mounted disks and of copies; BENCH_ARGS="--quick" and others
.PHONY: bench
bench: bench-mounts bench-copies

.PHONY: bench-mounts
bench-mounts: deps
	@$(MAKE) --no-print-directory build
	@$(call as_root,mounting and loop devices in the benchmark); \
	"$${run[@]}" python3 Tests/Bench/bench.py --bin $(RELEASE_BIN) $(BENCH_ARGS)

## bench-copies: only convert and merge, beside qemu-img and cp; COPIES_ARGS="--quick" and others
.PHONY: bench-copies
bench-copies: deps
	@$(MAKE) --no-print-directory build
	@$(call as_root,mounting and loop devices in the benchmark); \
	"$${run[@]}" python3 Tests/Bench/copies.py --bin $(RELEASE_BIN) $(COPIES_ARGS)

# ---- the Debian package -------------------------------------------------------------------------------------------

DEB_DIR := .build/deb

## deb: build the Debian package, in .build/deb
.PHONY: deb
deb:
	@$(MAKE) --no-print-directory deps PACKAGES="$(strip $(PACKAGES) $(DEB_PACKAGES))"
	dpkg-buildpackage -us -uc -b
	@mkdir -p $(DEB_DIR); rm -f $(DEB_DIR)/vdmount*; \
	changes="../vdmount_$$(dpkg-parsechangelog -S Version)_$$(dpkg --print-architecture).changes"; \
	for file in $$(sed -n '/^Files:/,$$s/^ [0-9a-f]\{32\} .* //p' "$$changes"); do mv "../$$file" $(DEB_DIR)/; done; \
	mv "$$changes" $(DEB_DIR)/; ls $(DEB_DIR)/*.deb

## test-deb: build and lint the package; install it in a bare Debian tree, use it there, purge it (root)
.PHONY: test-deb
test-deb: deb
	@$(call as_root,making a Debian tree); "$${run[@]}" Tests/System/deb.sh $(DEB_DIR)

## test-boot: boot a small Debian machine in QEMU: units, fstab lines, shutdown, little memory (root; long)
.PHONY: test-boot
test-boot: deb
	@$(MAKE) --no-print-directory deps PACKAGES="$(strip $(PACKAGES) $(DEB_PACKAGES) $(BOOT_PACKAGES))"
	@$(call as_root,making a Debian tree); "$${run[@]}" Tests/System/boot.sh $(DEB_DIR)

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

# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The front door. run, test, test-long, bench, shell and kernel install and build
# what they need first, from an empty machine on. `make help` lists all.

SHELL := /bin/bash
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
RELEASE := $(CARGO_TARGET_DIR)/release
KERNEL ?= test
NEWEST = $(if $(filter newest,$(KERNEL)),--newest)
DESTDIR ?=
PREFIX ?= /usr
KVER ?= $(shell uname -r)

# Recipes are in one place each; the shell measures them.
START = start=$$(date +%s%N)
ELAPSED = printf 'make $@: %s.%s s\n' $$((($$(date +%s%N) - start) / 1000000000)) \
	$$(((($$(date +%s%N) - start) / 100000000) % 10))

.DEFAULT_GOAL := all
.PHONY: all run test test-long bench bench-lib bench-compare shell check check-docs doc load unload install \
	uninstall setup kernel clean help programs vm-tool

all: programs vm-tool ## build the module (KERNEL=test; native: for the running kernel), libdune, the examples and the tools
	@scripts/module $(KERNEL)

run: ## run the five examples: natively with VT-x, else in the emulated machine
	@$(START); scripts/setup --quiet && scripts/build 'the examples' -p dune-examples -p dune-vm && \
	mkdir -p $(CARGO_TARGET_DIR)/run && \
	$(RELEASE)/wordcount --native --generate 512 $(CARGO_TARGET_DIR)/run/text >$(CARGO_TARGET_DIR)/run/words 2>/dev/null && \
	$(RELEASE)/dune-vm boot --native --memory 2048 --user tester --file $(CARGO_TARGET_DIR)/run:/opt/run -- "$$(cat scripts/run-examples)"; \
	status=$$?; $(ELAPSED); exit $$status

test: ## host tests, checks, the short matrix of machines; ends with a count (KERNEL=newest: the machines, with that kernel)
	@scripts/setup --quiet && scripts/run-tests $(NEWEST)

test-long: ## the full matrix and the long suites (KERNEL=newest as well)
	@scripts/setup --quiet --long && scripts/run-tests --long $(NEWEST)

bench: ## what the operations cost, beside Linux' and KVM's: a table, target/bench/results.json and report.html
	@scripts/setup --quiet && $(MAKE) --no-print-directory programs vm-tool && $(RELEASE)/dune-vm bench

bench-lib: ## what libdune is there for (traps, CPL3, hooks, page tables), each beside Linux' own ways, in one table
	@scripts/setup --quiet && $(MAKE) --no-print-directory programs vm-tool && $(RELEASE)/dune-vm bench --lib

bench-compare: ## ratios of two runs: make bench-compare OLD=results.json [NEW=results.json] [SAME=1: fails where they differ]
	@$(RELEASE)/dune-vm bench-compare $(if $(SAME),--same) $(OLD) $(NEW)

shell: ## an interactive root shell in the emulated machine, module loaded
	@scripts/setup --quiet && $(MAKE) --no-print-directory programs vm-tool && \
	$(RELEASE)/dune-vm shell --kernel $(KERNEL)

check: ## formatting, lints, unsafe allow-list, layering, licences, scripts
	@scripts/check

check-docs: ## listings, links and, for real, the shell lines of docs/guide.md
	@scripts/setup --quiet && scripts/check-docs

doc: ## the documentation of the crates, in target/doc
	@cargo doc --workspace --no-deps

load: ## insert dune.ko into the running kernel (root)
	@DUNE_MODULE=$$(scripts/install module "$(KVER)") && export DUNE_MODULE && scripts/load

unload: ## remove dune.ko from the running kernel (root)
	@scripts/unload

install: ## install module, udev rule, group and library (DESTDIR, PREFIX, KVER)
	@scripts/install install "$(DESTDIR)" "$(PREFIX)" "$(KVER)"

uninstall: ## remove what install installed
	@scripts/install uninstall "$(DESTDIR)" "$(PREFIX)" "$(KVER)"

setup: ## install the packages and tools that are missing (apt-get; root or sudo)
	@scripts/setup

kernel: ## build the reference kernel (KERNEL=test|debug|bench|pkeys|newest) into the cache
	@scripts/setup --quiet && scripts/kernel $(KERNEL)

clean: ## remove what was built in the tree (kernels stay in the cache)
	@rm -rf "$(CARGO_TARGET_DIR)"

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

programs:
	@scripts/build 'the programs' --workspace --exclude dune-vm

vm-tool:
	@scripts/build dune-vm -p dune-vm

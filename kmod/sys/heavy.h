/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Operations that are one instruction, or one call, and cost hundreds of cycles. With DUNE_COUNT_OPS=y each place that has
 * one counts it and leaves a mark in the section .dune_heavy, so that a reader of the disassembly finds none without
 * (dune-vm heavy-sites). The kinds are those of abi/src/abi.rs, HEAVY_*.
 */
#ifndef DUNE_HEAVY_H
#define DUNE_HEAVY_H

#define DUNE_HEAVY_VMREAD 0
#define DUNE_HEAVY_VMWRITE 1
#define DUNE_HEAVY_VMPTRLD 2
#define DUNE_HEAVY_INVALIDATION 3
#define DUNE_HEAVY_RDMSR 4
#define DUNE_HEAVY_WRMSR 5
#define DUNE_HEAVY_LOAD 6
#define DUNE_HEAVY_INTERRUPT_FLAG 7
#define DUNE_HEAVY_IPI 8
#define DUNE_HEAVY_ENTRY 9
#define DUNE_HEAVY_KINDS 10

#ifdef __ASSEMBLY__

#ifdef DUNE_COUNT_OPS
/* Changes the flags. */
.macro DUNE_HEAVY kind
	incq dune_heavy + 8 * \kind(%rip)
.Ldune_heavy\@:
	.pushsection .dune_heavy, ""
	.quad .Ldune_heavy\@
	.byte \kind
	.popsection
.endm
#else
.macro DUNE_HEAVY kind
.endm
#endif

#else

#ifdef DUNE_COUNT_OPS
/* The machine that counts has one CPU. */
extern unsigned long long dune_heavy[DUNE_HEAVY_KINDS];
#define DUNE_HEAVY(kind) \
	do { \
		dune_heavy[kind]++; \
		asm volatile("77:\n.pushsection .dune_heavy, \"\"\n.quad 77b\n.byte %c0\n.popsection" : : "i" (kind)); \
	} while (0)
#else
#define DUNE_HEAVY(kind) do { } while (0)
#endif

#endif

#endif

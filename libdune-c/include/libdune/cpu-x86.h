/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Vectors of exceptions, and model-specific registers, which only code in Dune mode can read and write.
 * docs/guest-policy.md says which: others are a general-protection fault.
 */
#pragma once

#include <stdint.h>

#define T_DIVIDE 0
#define T_DEBUG 1
#define T_NMI 2
#define T_BRKPT 3
#define T_OFLOW 4
#define T_BOUND 5
#define T_ILLOP 6
#define T_DEVICE 7
#define T_DBLFLT 8
#define T_TSS 10
#define T_SEGNP 11
#define T_STACK 12
#define T_GPFLT 13
#define T_GPF T_GPFLT
#define T_PGFLT 14
#define T_PF T_PGFLT
#define T_FPERR 16
#define T_ALIGN 17
#define T_MCHK 18
#define T_SIMD 19
#define T_SIMDERR T_SIMD

#define IDT_ENTRIES 256

#define MSR_LSTAR 0xc0000082
#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101
#define MSR_KERNEL_GS_BASE 0xc0000102

static inline unsigned long long native_read_msr(unsigned int msr)
{
	unsigned int low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return low | (unsigned long long)high << 32;
}

static inline void native_write_msr(unsigned int msr, unsigned int low, unsigned int high)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"(low), "d"(high) : "memory");
}

#define rdmsrl(msr, val) ((val) = native_read_msr((msr)))
#define wrmsrl(msr, val) native_write_msr((msr), (uint32_t)(uint64_t)(val), (uint32_t)((uint64_t)(val) >> 32))

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * x87, SSE and AVX state, saved and loaded by the program itself.
 */
#pragma once

#include <stdint.h>
#include <string.h>

struct fxsave_area {
	uint16_t cwd, swd, twd, fop;
	uint64_t rip, rdp;
	uint32_t mxcsr, mxcsr_mask;
	uint32_t st_regs[32];
	uint32_t xmm_regs[64];
	uint32_t padding[24];
} __attribute__((packed));

struct xsave_header {
	uint64_t xstate_bv;
	uint64_t reserved_zero[2];
	uint64_t reserved[5];
} __attribute__((packed));

struct xsave_area {
	struct fxsave_area fxsave;
	struct xsave_header header;
	uint32_t ymm_regs[64];
} __attribute__((packed, aligned(64)));

struct fpu_area {
	struct xsave_area xsave;
};

/* x87, SSE and AVX, as far as the process has them: what the area has room for. 0: the CPU has FXSAVE only. */
static inline uint32_t dune_fpu_mask(void)
{
	uint32_t a = 1, b, c = 0, d;

	__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
	if (!(c & 1u << 27))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	return a & 7;
}

/* The state with which a program starts. */
static inline void dune_fpu_init(struct fpu_area *fp)
{
	memset(fp, 0, sizeof(*fp));
	fp->xsave.fxsave.cwd = 0x37f;
	fp->xsave.fxsave.mxcsr = 0x1f80;
	fp->xsave.header.xstate_bv = 3;
}

/* Puts the state of an area into the registers. */
static inline void dune_fpu_load(struct fpu_area *fp)
{
	uint32_t mask = dune_fpu_mask();

	if (mask)
		__asm__ volatile("xrstor64 %0" : : "m"(*fp), "a"(mask), "d"(0) : "memory");
	else
		__asm__ volatile("fxrstor64 %0" : : "m"(*fp) : "memory");
}

/* Puts the state of the registers into an area. */
static inline void dune_fpu_save(struct fpu_area *fp)
{
	uint32_t mask = dune_fpu_mask();

	if (mask)
		__asm__ volatile("xsave64 %0" : "+m"(*fp) : "a"(mask), "d"(0) : "memory");
	else
		__asm__ volatile("fxsave64 %0" : "+m"(*fp) : : "memory");
}

static inline void dune_fpu_save_safe(struct fpu_area *fp)
{
	dune_fpu_save(fp);
}

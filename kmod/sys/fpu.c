// SPDX-License-Identifier: GPL-2.0
/*
 * The thread's extended state (FPU, SSE, AVX ...), which a guest has in the CPU as its own.
 */
#include <linux/sched.h>
#include <linux/version.h>
#include <asm/cpufeature.h>
#include <asm/fpu/api.h>
#include <asm/fpu/xcr.h>
#include <asm/fpu/xstate.h>
#include <asm/msr.h>
#include <asm/pkru.h>

#include "compat.h"
#include "helpers.h"

/* Somebody else's notifier: KVM's. With interrupts off. */
bool dune_user_return_pending(void)
{
	return test_thread_flag(TIF_USER_RETURN_NOTIFY) && !dune_user_return_is_ours();
}

/* 0 where Linux uses no protection keys. */
u32 dune_pkru(void)
{
	return read_pkru();
}

void dune_pkru_write(u32 pkru)
{
	write_pkru(pkru);
}

unsigned int dune_user_state_load(void)
{
	if (dune_user_return_pending())
		return DUNE_USER_STATE_ELSEWHERE;
	if (likely(!test_thread_flag(TIF_NEED_FPU_LOAD)))
		return DUNE_USER_STATE_LOADED;
#if DUNE_LENDS_FPU
	return DUNE_USER_STATE_IN_MEMORY;
#else
	switch_fpu_return();
	return DUNE_USER_STATE_LOADED;
#endif
}

#if DUNE_LENDS_FPU

/* What XRSTOR is asked for: all that Linux switches lazily. PKRU it writes at each switch of threads. */
static u64 lent_features(void)
{
	u64 supervisor = 0;

	if (boot_cpu_has(X86_FEATURE_XSAVES)) {
		DUNE_HEAVY(DUNE_HEAVY_RDMSR);
		rdmsrq(MSR_IA32_XSS, supervisor);
	}
	return (xgetbv(XCR_XFEATURE_ENABLED_MASK) | supervisor) & XFEATURE_MASK_FPSTATE;
}

/* x86_task_fpu(), which is a function that is not exported where Linux checks its argument. */
static struct fpu *fpu_of_current(void)
{
	return (void *)current + sizeof(*current);
}

/*
 * Puts the thread's extended state into the CPU, for a guest, although Linux goes on to find it in memory: with interrupts
 * off, until dune_fpu_give_back. Linux' own way to load it (switch_fpu_return) is exported to KVM only.
 */
u64 dune_fpu_lend(void)
{
	struct fpstate *fpstate = fpu_of_current()->fpstate;
	u64 features, xfd = 0;

	/* Nothing that is in the CPU is anybody's from here on. */
	kernel_fpu_begin_mask(0);
	if (!boot_cpu_has(X86_FEATURE_XSAVE)) {
		asm volatile("fxrstor64 %0" : : "m" (fpstate->regs.fxsave));
		return 0;
	}
	if (boot_cpu_has(X86_FEATURE_XFD)) {
		DUNE_HEAVY(DUNE_HEAVY_RDMSR);
		rdmsrq(MSR_IA32_XFD, xfd);
		if (xfd != fpstate->xfd) {
			DUNE_HEAVY(DUNE_HEAVY_WRMSR);
			wrmsrq(MSR_IA32_XFD, fpstate->xfd);
		}
	}
	features = lent_features();
	if (boot_cpu_has(X86_FEATURE_XSAVES))
		asm volatile("xrstors64 %0"
			     : : "m" (fpstate->regs.xsave), "a" ((u32)features), "d" ((u32)(features >> 32)) : "memory");
	else
		asm volatile("xrstor64 %0"
			     : : "m" (fpstate->regs.xsave), "a" ((u32)features), "d" ((u32)(features >> 32)) : "memory");
	return xfd;
}

/* xfd: what dune_fpu_lend returned. */
void dune_fpu_give_back(u64 xfd)
{
	struct fpu *fpu = fpu_of_current();
	struct fpstate *fpstate = fpu->fpstate;
	u64 features = fpstate->xfeatures;

#define SAVE(how) \
	asm volatile(how " %0" \
		     : "+m" (fpstate->regs.xsave) : "a" ((u32)features), "d" ((u32)(features >> 32)) : "memory")
	if (!boot_cpu_has(X86_FEATURE_XSAVE))
		asm volatile("fxsave64 %0" : "=m" (fpstate->regs.fxsave));
	/* In the format that Linux has it in. */
	else if (boot_cpu_has(X86_FEATURE_XSAVES))
		SAVE("xsaves64");
	else if (boot_cpu_has(X86_FEATURE_XSAVEC))
		SAVE("xsavec64");
	else
		SAVE("xsave64");
#undef SAVE
	if (boot_cpu_has(X86_FEATURE_XFD) && xfd != fpstate->xfd) {
		DUNE_HEAVY(DUNE_HEAVY_WRMSR);
		wrmsrq(MSR_IA32_XFD, xfd);
	}
	/* What a CPU that the thread was on before may still have of it is old now (asm/fpu/sched.h, fpregs_state_valid). */
	fpu->last_cpu = -1;
	kernel_fpu_end();
}

#else

u64 dune_fpu_lend(void)
{
	return 0;
}

void dune_fpu_give_back(u64 xfd)
{
}

#endif

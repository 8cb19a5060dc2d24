// SPDX-License-Identifier: GPL-2.0
/*
 * What protects the host from a guest's speculation outside the entry stub (vmenter.S has the rest): the L1 data cache
 * flushed before an entry, IBPB between guests, #NM of extended features. Code at CPL0 of a guest is an unprivileged
 * user's and chooses its page tables, so a guest is treated as a virtual machine is, not as a process.
 */

#include <linux/cpu.h>
#include <linux/gfp.h>
#include <linux/hardirq.h>
#include <linux/jump_label.h>
#include <linux/moduleparam.h>
#include <linux/sched/smt.h>
#include <linux/string.h>
#include <linux/version.h>
#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>
#include <asm/processor.h>

#include "compat.h"
#include "helpers.h"

static bool dune_allow_l1tf;
module_param_named(allow_l1tf, dune_allow_l1tf, bool, 0444);
MODULE_PARM_DESC(allow_l1tf, "Load on a CPU with L1TF also where hyper-threading is on, and do not flush the L1 data cache");

/* Twice the L1 data cache of every affected CPU: its replacement is not quite LRU. */
#define DUNE_L1D_ORDER 4
#define DUNE_L1D_BYTES (PAGE_SIZE << DUNE_L1D_ORDER)

/* Entries empty the L1 data cache. Set before the first and until behind the last. */
bool dune_l1d_flushes;
static DEFINE_STATIC_KEY_FALSE(dune_l1d_always);
static void *dune_l1d_pages;

/* Whether the kernel was told to leave L1TF alone: the owner's word. */
static bool dune_l1tf_is_off(void)
{
	if (cpu_mitigations_off())
		return true;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	return l1tf_mitigation == L1TF_MITIGATION_OFF;
#else
	return false;
#endif
}

static bool dune_l1tf_is_full(void)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	return l1tf_mitigation == L1TF_MITIGATION_FULL || l1tf_mitigation == L1TF_MITIGATION_FULL_FORCE;
#else
	return false;
#endif
}

static bool dune_has_l1tf(void)
{
	u64 capabilities = 0;

	if (!boot_cpu_has_bug(X86_BUG_L1TF))
		return false;
	if (boot_cpu_has(X86_FEATURE_ARCH_CAPABILITIES)) {
		DUNE_HEAVY(DUNE_HEAVY_RDMSR);
		rdmsrq_safe(MSR_IA32_ARCH_CAPABILITIES, &capabilities);
	}
	return !(capabilities & ARCH_CAP_SKIP_VMENTRY_L1DFLUSH);
}

/* 0, or -EPERM where a sibling thread could read what a guest may not, or -ENOMEM. */
int dune_l1tf_start(void)
{
	if (!dune_has_l1tf() || dune_l1tf_is_off() || dune_allow_l1tf)
		return 0;
	if (sched_smt_active())
		return -EPERM;
	if (!boot_cpu_has(X86_FEATURE_FLUSH_L1D)) {
		unsigned int i;

		dune_l1d_pages = (void *)__get_free_pages(GFP_KERNEL, DUNE_L1D_ORDER);
		if (!dune_l1d_pages)
			return -ENOMEM;
		/* Different contents, so that nobody merges them. */
		for (i = 0; i < 1u << DUNE_L1D_ORDER; i++)
			memset(dune_l1d_pages + i * PAGE_SIZE, i + 1, PAGE_SIZE);
	}
	if (dune_l1tf_is_full())
		static_branch_enable(&dune_l1d_always);
	dune_l1d_flushes = true;
	return 0;
}

void dune_l1tf_stop(void)
{
	dune_l1d_flushes = false;
	static_branch_disable(&dune_l1d_always);
	free_pages((unsigned long)dune_l1d_pages, DUNE_L1D_ORDER);
	dune_l1d_pages = NULL;
}

static noinstr void dune_l1d_flush(void)
{
	unsigned long offset;

	if (cpu_feature_enabled(X86_FEATURE_FLUSH_L1D)) {
		DUNE_HEAVY(DUNE_HEAVY_WRMSR);
		native_wrmsrq(MSR_IA32_FLUSH_CMD, L1D_FLUSH);
		return;
	}
	/* Translations first, so that no page walk comes in between; LFENCE keeps the two apart and the entry behind. */
	for (offset = 0; offset < DUNE_L1D_BYTES; offset += PAGE_SIZE)
		asm volatile("movzbl (%0), %%eax" : : "r" (dune_l1d_pages + offset) : "eax", "memory");
	asm volatile("lfence" : : : "memory");
	for (offset = 0; offset < DUNE_L1D_BYTES; offset += 64)
		asm volatile("movzbl (%0), %%eax" : : "r" (dune_l1d_pages + offset) : "eax", "memory");
	asm volatile("lfence" : : : "memory");
}

/*
 * Empties the L1 data cache before an entry where a guest could read it (L1TF), unless only code that handles no secret
 * ran since the last entry: `host_ran` says whether other code did, Linux' own flag whether an interrupt came.
 */
/* Called where `dune_l1d_flushes` is on. */
noinstr void dune_l1tf_before_entry(bool host_ran)
{
#if IS_ENABLED(CONFIG_KVM_INTEL)
	host_ran |= kvm_get_cpu_l1tf_flush_l1d();
	kvm_clear_cpu_l1tf_flush_l1d();
#else
	host_ran = true;
#endif
	if (host_ran || static_branch_unlikely(&dune_l1d_always))
		dune_l1d_flush();
}

/* Another process' guest ran on this CPU last: it shall not have trained this one's indirect branches. */
void dune_ibpb(void)
{
#ifdef X86_FEATURE_USE_IBPB
	if (cpu_feature_enabled(X86_FEATURE_USE_IBPB))
#else
	if (cpu_feature_enabled(X86_FEATURE_IBPB) && !cpu_mitigations_off())
#endif
	{
		DUNE_HEAVY(DUNE_HEAVY_WRMSR);
		native_wrmsrq(MSR_IA32_PRED_CMD, PRED_CMD_IBPB);
	}
}

bool dune_cpu_has_pebs(void)
{
	u64 enabled;

	if (!boot_cpu_has(X86_FEATURE_PEBS))
		return false;
	DUNE_HEAVY(DUNE_HEAVY_RDMSR);
	return !rdmsrq_safe(MSR_IA32_PEBS_ENABLE, &enabled);
}

bool dune_cpu_has_xfd(void)
{
	return boot_cpu_has(X86_FEATURE_XFD);
}

/*
 * Forgets why an extended feature raised #NM in a guest: Linux would take what stands there for the reason of the next
 * #NM on this CPU, whoever's it is.
 */
void dune_xfd_err_clear(void)
{
	if (cpu_feature_enabled(X86_FEATURE_XFD)) {
		DUNE_HEAVY(DUNE_HEAVY_WRMSR);
		native_wrmsrq(MSR_IA32_XFD_ERR, 0);
	}
}

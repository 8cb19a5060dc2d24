// SPDX-License-Identifier: GPL-2.0
/* Debug-only: what the tests look at to see that no guest changed the host's CPU. Read-only. */

#ifdef DUNE_DEBUG_KNOBS

#include <linux/moduleparam.h>
#include <linux/preempt.h>
#include <linux/sysfs.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/msr.h>
#include <asm/special_insns.h>
#include <asm/cpufeature.h>
#include <linux/version.h>
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
#include <asm/fpu/xcr.h>
#endif

static const struct {
	const char *name;
	u32 number;
} dune_host_msrs[] = {
	{ "EFER", MSR_EFER },
	{ "STAR", MSR_STAR },
	{ "LSTAR", MSR_LSTAR },
	{ "CSTAR", MSR_CSTAR },
	{ "FMASK", MSR_SYSCALL_MASK },
	{ "GS_BASE", MSR_GS_BASE },
	{ "KERNEL_GS_BASE", MSR_KERNEL_GS_BASE },
	{ "TSC_AUX", MSR_TSC_AUX },
	{ "SYSENTER_CS", MSR_IA32_SYSENTER_CS },
	{ "SYSENTER_ESP", MSR_IA32_SYSENTER_ESP },
	{ "SYSENTER_EIP", MSR_IA32_SYSENTER_EIP },
	{ "DEBUGCTL", MSR_IA32_DEBUGCTLMSR },
	{ "SPEC_CTRL", MSR_IA32_SPEC_CTRL },
	{ "XSS", MSR_IA32_XSS },
	{ "PAT", MSR_IA32_CR_PAT },
	{ "MISC_ENABLE", MSR_IA32_MISC_ENABLE },
	{ "APIC_BASE", MSR_IA32_APICBASE },
	{ "MTRR_DEF_TYPE", MSR_MTRRdefType },
	{ "FEATURE_CONTROL", MSR_IA32_FEAT_CTL },
};

static int dune_host_state_get(char *buffer, const struct kernel_param *kp)
{
	struct desc_ptr gdt, idt;
	unsigned long dr7;
	u16 ldt, tr, cs, ss;
	int at = 0;
	unsigned int i;
	u64 value;

	preempt_disable();
	get_debugreg(dr7, 7);
	native_store_gdt(&gdt);
	store_idt(&idt);
	/* Not IDTR's limit: a VM exit sets it to 0xffff, and there are 256 vectors. */
	asm volatile("sldt %0" : "=m" (ldt));
	asm volatile("str %0" : "=m" (tr));
	asm volatile("mov %%cs, %0" : "=rm" (cs));
	asm volatile("mov %%ss, %0" : "=rm" (ss));
	at += sysfs_emit_at(buffer, at, "CR0 %lx\nCR4 %lx\n", read_cr0(), native_read_cr4());
	asm volatile("mov %%cr8, %0" : "=r" (value));
	at += sysfs_emit_at(buffer, at, "CR8 %llx\nDR7 %lx\n", value, dr7);
	at += sysfs_emit_at(buffer, at, "GDTR %lx %x\nIDTR %lx\n", gdt.address, gdt.size, idt.address);
	at += sysfs_emit_at(buffer, at, "LDTR %x\nTR %x\nCS %x\nSS %x\n", ldt, tr, cs, ss);
	if (boot_cpu_has(X86_FEATURE_OSXSAVE))
		at += sysfs_emit_at(buffer, at, "XCR0 %llx\n", xgetbv(XCR_XFEATURE_ENABLED_MASK));
	for (i = 0; i < ARRAY_SIZE(dune_host_msrs); i++) {
		if (!rdmsrl_safe(dune_host_msrs[i].number, &value))
			at += sysfs_emit_at(buffer, at, "%s %llx\n", dune_host_msrs[i].name, value);
	}
	preempt_enable();
	return at;
}

static const struct kernel_param_ops dune_host_state_ops = { .get = dune_host_state_get };
/* World-readable: kernels with this knob are for tests only. */
module_param_cb(host_state, &dune_host_state_ops, NULL, 0444);

#endif

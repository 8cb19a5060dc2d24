// SPDX-License-Identifier: GPL-2.0
/* Debug-only: what the tests look at to see that no guest changed the host's CPU, and what they map. */

#ifdef DUNE_DEBUG_KNOBS

#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/preempt.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/msr.h>
#include <asm/set_memory.h>
#include <asm/special_insns.h>
#include <asm/cpufeature.h>
#include <asm/fpu/xcr.h>

#include "compat.h"
#include "helpers.h"

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
		if (!rdmsrq_safe(dune_host_msrs[i].number, &value))
			at += sysfs_emit_at(buffer, at, "%s %llx\n", dune_host_msrs[i].name, value);
	}
	preempt_enable();
	return at;
}

static const struct kernel_param_ops dune_host_state_ops = { .get = dune_host_state_get };
/* World-readable: kernels with this knob are for tests only. */
module_param_cb(host_state, &dune_host_state_ops, NULL, 0444);

/*
 * /sys/kernel/debug/dune/frames: what a driver does with remap_pfn_range(). Pages of memory of the file's own, one after the
 * other write-back, write-combining, uncached; page N of the file is to be mapped by itself.
 */
enum { DUNE_FRAME_WB, DUNE_FRAME_WC, DUNE_FRAME_UC, DUNE_FRAMES };

struct dune_frames {
	unsigned long page[DUNE_FRAMES];
};

static void dune_frames_free(struct dune_frames *frames)
{
	unsigned int i;

	for (i = 0; i < DUNE_FRAMES; i++) {
		if (!frames->page[i])
			continue;
		if (i != DUNE_FRAME_WB)
			set_memory_wb(frames->page[i], 1);
		free_page(frames->page[i]);
	}
	kfree(frames);
}

static int dune_frames_open(struct inode *inode, struct file *file)
{
	struct dune_frames *frames = kzalloc(sizeof(*frames), GFP_KERNEL);
	unsigned int i;
	int err = 0;

	if (!frames)
		return -ENOMEM;
	for (i = 0; !err && i < DUNE_FRAMES; i++) {
		frames->page[i] = get_zeroed_page(GFP_KERNEL);
		if (!frames->page[i])
			err = -ENOMEM;
		else if (i == DUNE_FRAME_WC)
			err = set_memory_wc(frames->page[i], 1);
		else if (i == DUNE_FRAME_UC)
			err = set_memory_uc(frames->page[i], 1);
	}
	if (err) {
		dune_frames_free(frames);
		return err;
	}
	file->private_data = frames;
	return 0;
}

static int dune_frames_release(struct inode *inode, struct file *file)
{
	dune_frames_free(file->private_data);
	return 0;
}

static int dune_frames_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct dune_frames *frames = file->private_data;

	if (vma->vm_pgoff >= DUNE_FRAMES || vma->vm_end - vma->vm_start != PAGE_SIZE)
		return -EINVAL;
	if (vma->vm_pgoff == DUNE_FRAME_WC)
		vma->vm_page_prot = pgprot_writecombine(vma->vm_page_prot);
	else if (vma->vm_pgoff == DUNE_FRAME_UC)
		vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	return remap_pfn_range(vma, vma->vm_start, PHYS_PFN(__pa(frames->page[vma->vm_pgoff])), PAGE_SIZE,
			       vma->vm_page_prot);
}

static const struct file_operations dune_frames_fops = {
	.owner = THIS_MODULE,
	.open = dune_frames_open,
	.release = dune_frames_release,
	.mmap = dune_frames_mmap,
};

void dune_knob_frames(void *dir)
{
	/* debugfs' own wrapper of file operations has no mmap. */
	debugfs_create_file_unsafe("frames", 0600, dir, NULL, &dune_frames_fops);
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What vmenter.S and Rust share. The run page's offsets are those of abi/src/abi.rs, struct dune_entry those of
 * `vmx::enter::Entry`; both are asserted in kmod/vmx/enter.rs.
 */
#ifndef DUNE_VMENTER_H
#define DUNE_VMENTER_H

#define DUNE_RUN_RAX 0
#define DUNE_RUN_RCX 8
#define DUNE_RUN_RDX 16
#define DUNE_RUN_RBX 24
#define DUNE_RUN_RBP 40
#define DUNE_RUN_RSI 48
#define DUNE_RUN_RDI 56
#define DUNE_RUN_R8 64
#define DUNE_RUN_R9 72
#define DUNE_RUN_R10 80
#define DUNE_RUN_R11 88
#define DUNE_RUN_R12 96
#define DUNE_RUN_R13 104
#define DUNE_RUN_R14 112
#define DUNE_RUN_R15 120
#define DUNE_RUN_CR2 144

#define DUNE_ENTRY_HOST_RSP 0
#define DUNE_ENTRY_LAUNCHED 8

/* What dune_vmenter returns. */
#define DUNE_ENTER_EXIT 0	/* the guest ran and exited, or the entry failed with an exit reason */
#define DUNE_ENTER_FAIL_INVALID 1	/* VMfailInvalid: no current VMCS */
#define DUNE_ENTER_FAIL_VALID 2	/* VMfailValid: VM_INSTRUCTION_ERROR says why */
#define DUNE_ENTER_FAULT 3	/* the instruction faulted: VMX is off on this CPU */

#define DUNE_VMCS_HOST_RSP 0x6c14

#ifndef __ASSEMBLY__
struct dune_entry {
	unsigned long host_rsp;	/* what HOST_RSP of the VMCS holds; ~0 = unknown */
	unsigned long launched;	/* 0: VMLAUNCH, else VMRESUME */
	unsigned long noted;	/* jiffies when RCU was told of an entry */
};

unsigned long dune_vmenter(void *run_page, struct dune_entry *entry);
extern char dune_vmexit[];
#endif

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * unsigned long dune_vmenter(void *run_page, struct dune_entry *entry)
 *
 * Life of an entry, with interrupts off and the VMCS current:
 *   1. Save what the C ABI wants back, and both arguments.
 *   2. Write HOST_RSP when it is not what the VMCS has (the stack depth is nearly always the same).
 *   3. Load the guest's CR2 (when it differs) and general-purpose registers from the run page.
 *   4. VERW: empty the CPU's buffers where a guest could sample them (MDS, TAA, RFDS). Nothing is loaded after it.
 *   5. VMLAUNCH or VMRESUME. On success the guest runs; its exit comes back at dune_vmexit with HOST_RSP.
 *   6. Store the guest's registers and CR2 to the run page.
 *   7. Clear every register the guest had, so that nothing of it is used speculatively.
 *   8. Refill the return stack buffer, write SPEC_CTRL again under legacy IBRS (the bit counts from the last write in
 *      this mode on), clear the branch history: before the first unbalanced RET and indirect branch.
 * Each of 4 and 8 is there only where the kernel has its own on for KVM: ALTERNATIVE on its feature bits.
 * Not here: FPU (the guest's is the thread's), segment bases and MSRs (VMCS and host_state.rs), NMI (enter.rs), L1D flush
 * and IBPB (mitigations.c). SPEC_CTRL stays the host's in the guest, which cannot write it.
 * The run page is memory that user space can write at any time: only register values come from it.
 */
#include <linux/linkage.h>
#include <asm/alternative.h>
#include <asm/asm.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/segment.h>
#include <asm/unwind_hints.h>

#include "heavy.h"
#include "vmenter.h"

/* The kernel's names of "clear the branch history after a VM exit" over its versions. */
#if defined(X86_FEATURE_CLEAR_BHB_LOOP_ON_VMEXIT)
#define DUNE_FEATURE_BHB X86_FEATURE_CLEAR_BHB_LOOP_ON_VMEXIT
#elif defined(X86_FEATURE_CLEAR_BHB_VMEXIT)
#define DUNE_FEATURE_BHB X86_FEATURE_CLEAR_BHB_VMEXIT
#else
#define DUNE_FEATURE_BHB X86_FEATURE_CLEAR_BHB_LOOP
#endif

.section .rodata
.align 2
/* VERW empties the buffers in its memory form only; the kernel's own operand is not for every module. */
SYM_DATA_LOCAL(dune_verw_selector, .word __KERNEL_DS)

.section .noinstr.text, "ax"

/*
 * Overwrites the branch history with 5 * 5 taken branches, after Intel's "Branch History Injection" (software
 * BHB-clearing sequence): nested calls keep the loop stream detector out. Clobbers RAX, RCX and flags.
 */
.align 64
SYM_FUNC_START_LOCAL(dune_clear_branch_history)
	push %rbp
	mov %rsp, %rbp
	mov $5, %ecx
	ANNOTATE_INTRA_FUNCTION_CALL
	call .Lbhb_outer
	jmp .Lbhb_done
	.align 64, 0xcc
	/* RETs in the upper half of a cache line, or they would take the slow way against indirect target selection. */
	.skip 27, 0xcc
	ANNOTATE_INTRA_FUNCTION_CALL
.Lbhb_outer:
	call .Lbhb_inner
	RET
	.align 64, 0xcc
	.skip 16, 0xcc
.Lbhb_inner:
	mov $5, %eax
.Lbhb_loop:
	jmp .Lbhb_next
	nop
.Lbhb_next:
	dec %eax
	jnz .Lbhb_loop
	dec %ecx
	jnz .Lbhb_outer
	RET
.Lbhb_done:
	lfence
	pop %rbp
	RET
SYM_FUNC_END(dune_clear_branch_history)
STACK_FRAME_NON_STANDARD(dune_clear_branch_history)

SYM_FUNC_START(dune_vmenter)
	push %rbp
	mov %rsp, %rbp
	push %r15
	push %r14
	push %r13
	push %r12
	push %rbx
	push %rsi			/* 8(%rsp) below: entry */
	push %rdi			/* 0(%rsp) below: run page */

	cmp %rsp, DUNE_ENTRY_HOST_RSP(%rsi)
	je .Lrsp_done
	mov $DUNE_VMCS_HOST_RSP, %eax
	DUNE_HEAVY DUNE_HEAVY_VMWRITE
.Lwrite_rsp:
	vmwrite %rsp, %rax
	jbe .Lfail_flags
	mov %rsp, DUNE_ENTRY_HOST_RSP(%rsi)
.Lrsp_done:

	mov DUNE_RUN_CR2(%rdi), %rcx
	mov %cr2, %rdx
	cmp %rcx, %rdx
	je .Lcr2_done
	DUNE_HEAVY DUNE_HEAVY_LOAD
	mov %rcx, %cr2
.Lcr2_done:
	DUNE_HEAVY DUNE_HEAVY_ENTRY

	/* CF decides below: MOV leaves the flags alone, VERW all but ZF. */
	cmpq $1, DUNE_ENTRY_LAUNCHED(%rsi)
	mov DUNE_RUN_RAX(%rdi), %rax
	mov DUNE_RUN_RCX(%rdi), %rcx
	mov DUNE_RUN_RDX(%rdi), %rdx
	mov DUNE_RUN_RBX(%rdi), %rbx
	mov DUNE_RUN_RBP(%rdi), %rbp
	mov DUNE_RUN_RSI(%rdi), %rsi
	mov DUNE_RUN_R8(%rdi), %r8
	mov DUNE_RUN_R9(%rdi), %r9
	mov DUNE_RUN_R10(%rdi), %r10
	mov DUNE_RUN_R11(%rdi), %r11
	mov DUNE_RUN_R12(%rdi), %r12
	mov DUNE_RUN_R13(%rdi), %r13
	mov DUNE_RUN_R14(%rdi), %r14
	mov DUNE_RUN_R15(%rdi), %r15
	mov DUNE_RUN_RDI(%rdi), %rdi

#ifdef X86_FEATURE_CLEAR_CPU_BUF_VM
	ALTERNATIVE_2 "", "verw dune_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF, \
		"verw dune_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF_VM
#else
	ALTERNATIVE "", "verw dune_verw_selector(%rip)", X86_FEATURE_CLEAR_CPU_BUF
#endif
	jc .Lvmlaunch

	/* An exit comes back behind these as if by a jump: tell objtool that the stack is as it was here. */
	UNWIND_HINT_SAVE

.Lvmresume:
	vmresume
	jmp .Lfail_flags
.Lvmlaunch:
	vmlaunch
	jmp .Lfail_flags

	_ASM_EXTABLE(.Lwrite_rsp, .Lfault)
	_ASM_EXTABLE(.Lvmresume, .Lfault)
	_ASM_EXTABLE(.Lvmlaunch, .Lfault)

SYM_INNER_LABEL_ALIGN(dune_vmexit, SYM_L_GLOBAL)
	UNWIND_HINT_RESTORE
	ENDBR

	push %rdi
	mov 8(%rsp), %rdi
	mov %rax, DUNE_RUN_RAX(%rdi)
	mov %rcx, DUNE_RUN_RCX(%rdi)
	mov %rdx, DUNE_RUN_RDX(%rdi)
	mov %rbx, DUNE_RUN_RBX(%rdi)
	mov %rbp, DUNE_RUN_RBP(%rdi)
	mov %rsi, DUNE_RUN_RSI(%rdi)
	pop DUNE_RUN_RDI(%rdi)
	mov %r8, DUNE_RUN_R8(%rdi)
	mov %r9, DUNE_RUN_R9(%rdi)
	mov %r10, DUNE_RUN_R10(%rdi)
	mov %r11, DUNE_RUN_R11(%rdi)
	mov %r12, DUNE_RUN_R12(%rdi)
	mov %r13, DUNE_RUN_R13(%rdi)
	mov %r14, DUNE_RUN_R14(%rdi)
	mov %r15, DUNE_RUN_R15(%rdi)
	mov %cr2, %rcx
	mov %rcx, DUNE_RUN_CR2(%rdi)

	/* RBX is the result from here on: DUNE_ENTER_EXIT. */
	xor %ebx, %ebx

.Lclear:
	xor %eax, %eax
	xor %ecx, %ecx
	xor %edx, %edx
	xor %esi, %esi
	xor %edi, %edi
	xor %ebp, %ebp
	xor %r8d, %r8d
	xor %r9d, %r9d
	xor %r10d, %r10d
	xor %r11d, %r11d
	xor %r12d, %r12d
	xor %r13d, %r13d
	xor %r14d, %r14d
	xor %r15d, %r15d

	FILL_RETURN_BUFFER %rcx, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_VMEXIT, X86_FEATURE_RSB_VMEXIT_LITE

	ALTERNATIVE "jmp .Lno_ibrs", "", X86_FEATURE_KERNEL_IBRS
	DUNE_HEAVY DUNE_HEAVY_RDMSR
	DUNE_HEAVY DUNE_HEAVY_WRMSR
	mov $MSR_IA32_SPEC_CTRL, %ecx
	rdmsr
	wrmsr
.Lno_ibrs:
	ALTERNATIVE "", "call dune_clear_branch_history", DUNE_FEATURE_BHB

	mov %rbx, %rax
	pop %rdi
	pop %rsi
	pop %rbx
	pop %r12
	pop %r13
	pop %r14
	pop %r15
	pop %rbp
	RET

	/* VMfail: CF says invalid, ZF says valid. Nothing of the guest ran. */
.Lfail_flags:
	mov $DUNE_ENTER_FAIL_INVALID, %ebx
	jc .Lclear
	mov $DUNE_ENTER_FAIL_VALID, %ebx
	jmp .Lclear
.Lfault:
	mov $DUNE_ENTER_FAULT, %ebx
	jmp .Lclear
SYM_FUNC_END(dune_vmenter)

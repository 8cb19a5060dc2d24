/* SPDX-License-Identifier: GPL-2.0 */
/*
 * unsigned long dune_vmenter(void *run_page, struct dune_entry *entry)
 *
 * Life of an entry, with interrupts off and the VMCS current:
 *   1. Save what the C ABI wants back, and both arguments.
 *   2. Write HOST_RSP when it is not what the VMCS has (the stack depth is nearly always the same).
 *   3. Load the guest's CR2 (when it differs) and general-purpose registers from the run page.
 *   4. VMLAUNCH or VMRESUME. On success the guest runs; its exit comes back at dune_vmexit with HOST_RSP.
 *   5. Store the guest's registers and CR2 to the run page.
 *   6. Clear every register the guest had, so that nothing of it is used speculatively.
 *   7. Refill the return stack buffer before the first unbalanced RET.
 * Not here: FPU (the guest's is the thread's), segment bases and MSRs (VMCS and host_state.rs), NMI (enter.rs).
 * The run page is memory that user space can write at any time: only register values come from it.
 */
#include <linux/linkage.h>
#include <asm/alternative.h>
#include <asm/asm.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>

#include "vmenter.h"

.section .noinstr.text, "ax"

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
.Lwrite_rsp:
	vmwrite %rsp, %rax
	jbe .Lfail_flags
	mov %rsp, DUNE_ENTRY_HOST_RSP(%rsi)
.Lrsp_done:

	mov DUNE_RUN_CR2(%rdi), %rcx
	mov %cr2, %rdx
	cmp %rcx, %rdx
	je .Lcr2_done
	mov %rcx, %cr2
.Lcr2_done:

	cmpq $0, DUNE_ENTRY_LAUNCHED(%rsi)
	/* MOV leaves the flags alone: ZF decides below. */
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
	jz .Lvmlaunch

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

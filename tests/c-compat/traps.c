/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Exceptions at CPL0: handlers see the registers, change them, and the program goes on with what they left.
 */
#include <stdio.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

static int breakpoints, divisions, undefined, protections, interrupts;
static struct dune_tf seen;

static void on_breakpoint(struct dune_tf *tf)
{
	breakpoints++;
	seen = *tf;
	tf->rbx = 0x1111;
	tf->r12 = 0x2222;
	tf->rax = 0x3333;
}

static void on_divide(struct dune_tf *tf)
{
	divisions++;
	/* "div ecx" is two bytes long: go on behind it, with a result of our own. */
	tf->rip += 2;
	tf->rax = 4711;
	tf->rdx = 42;
}

static void on_undefined(struct dune_tf *tf)
{
	undefined++;
	/* A breakpoint inside a handler: handlers nest. */
	__asm__ volatile("int3" : : : "rax", "rbx", "r12");
	tf->rip += 2;
}

static void on_protection(struct dune_tf *tf)
{
	protections++;
	seen = *tf;
	/* Jumps to where RBX leads. */
	tf->rip = tf->rbx;
}

static void on_interrupt(struct dune_tf *tf)
{
	interrupts++;
	tf->rax = ARG0(tf) + ARG1(tf) + ARG2(tf) + ARG3(tf) + ARG4(tf) + ARG5(tf);
}

static unsigned short code_segment(void)
{
	unsigned short cs;

	__asm__ volatile("mov %%cs, %0" : "=r"(cs));
	return cs;
}

static void test_breakpoint(void)
{
	unsigned long rax = 0xaaaa, rbx = 0xbbbb, r12, rip;

	assert(dune_register_intr_handler(T_BRKPT, on_breakpoint) == 0);
	__asm__ volatile("mov $0xcccc, %%r12d\n\t"
			 "int3\n\t"
			 "1: lea 1b(%%rip), %2\n\t"
			 "mov %%r12, %3"
			 : "+a"(rax), "+b"(rbx), "=&r"(rip), "=&r"(r12)
			 :
			 : "r12", "memory");
	assert(breakpoints == 1);
	assert(seen.rax == 0xaaaa && seen.rbx == 0xbbbb && seen.r12 == 0xcccc);
	assert(seen.rip == rip);
	assert(seen.cs == GD_KT && seen.ss == GD_KD);
	assert(rax == 0x3333 && rbx == 0x1111 && r12 == 0x2222);
}

static void test_divide(void)
{
	unsigned int quotient = 7, remainder = 0;

	assert(dune_register_intr_handler(T_DIVIDE, on_divide) == 0);
	__asm__ volatile("divl %%ecx" : "+a"(quotient), "+d"(remainder) : "c"(0) : "memory");
	assert(divisions == 1);
	assert(quotient == 4711 && remainder == 42);
	__asm__ volatile("divl %%ecx" : "+a"(quotient), "+d"(remainder) : "c"(0) : "memory");
	assert(divisions == 2);
}

static void test_nesting(void)
{
	assert(dune_register_intr_handler(T_ILLOP, on_undefined) == 0);
	__asm__ volatile("ud2" : : : "memory");
	assert(undefined == 1 && breakpoints == 2);
}

static void test_error_code(void)
{
	unsigned long behind = 0;

	assert(dune_register_intr_handler(T_GPFLT, on_protection) == 0);
	/* A selector behind the end of the GDT: its number is the error code. */
	__asm__ volatile("lea 1f(%%rip), %0\n\t"
			 "mov %1, %%es\n\t"
			 "1:"
			 : "+b"(behind)
			 : "r"(0x7f8)
			 : "memory");
	assert(protections == 1);
	assert(seen.err == 0x7f8);
}

static void test_interrupt(void)
{
	unsigned long sum = 0;

	assert(dune_register_intr_handler(0x55, on_interrupt) == 0);
	__asm__ volatile("mov $16, %%r8d\n\t"
			 "mov $32, %%r9d\n\t"
			 "int $0x55"
			 : "+a"(sum)
			 : "D"(1), "S"(2), "d"(4), "c"(8)
			 : "r8", "r9", "memory");
	assert(interrupts == 1 && sum == 63);
}

int main(void)
{
	assert(dune_init_and_enter() == 0);
	assert(code_segment() == GD_KT);
	test_breakpoint();
	test_divide();
	test_nesting();
	test_error_code();
	test_interrupt();
	assert(dune_register_intr_handler(256, on_interrupt) < 0);
	assert(dune_register_intr_handler(-1, on_interrupt) < 0);
	dune_dump_trap_frame(&seen);
	/* The program goes on as any does. */
	printf("%d breakpoints, %d divisions\n", breakpoints, divisions);
	return fflush(stdout) != 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Exceptions at CPL0: handlers see the registers, change them, and the program goes on with what they left.
 */
#include <stdio.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

#include "capture.h"

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

static void wrote_register(const char *name, unsigned long value)
{
	char text[32];

	snprintf(text, sizeof(text), "%s %#018lx", name, value);
	assert(wrote(text, ""));
}

static void test_dump(void)
{
	struct dune_tf tf = {
		.rdi = 0x1001, .rsi = 0x1002, .rdx = 0x1003, .rcx = 0x1004, .r8 = 0x1005, .r9 = 0x1006,
		.r10 = 0x1007, .r11 = 0x1008, .rbx = 0x1009, .rbp = 0x100a, .r12 = 0x100b, .r13 = 0x100c,
		.r14 = 0x100d, .r15 = 0x100e, .rax = 0xfedcba9876543210, .err = 0x7f8, .rip = 0x100f,
		.cs = GD_UT | 3, .rflags = 0x246, .rsp = 0x1010, .ss = GD_UD | 3,
	};

	begin_capture();
	dune_dump_trap_frame(&tf);
	end_capture();
	wrote_register("RDI", tf.rdi);
	wrote_register("RSI", tf.rsi);
	wrote_register("RDX", tf.rdx);
	wrote_register("RCX", tf.rcx);
	wrote_register("R8 ", tf.r8);
	wrote_register("R9 ", tf.r9);
	wrote_register("R10", tf.r10);
	wrote_register("R11", tf.r11);
	wrote_register("RBX", tf.rbx);
	wrote_register("RBP", tf.rbp);
	wrote_register("R12", tf.r12);
	wrote_register("R13", tf.r13);
	wrote_register("R14", tf.r14);
	wrote_register("R15", tf.r15);
	wrote_register("RAX", tf.rax);
	wrote_register("RIP", tf.rip);
	wrote_register("FLG", tf.rflags);
	wrote_register("RSP", tf.rsp);
	assert(wrote("CS 0x0033  SS 0x002b", "0x7f8"));
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
	test_dump();
	/* The program goes on as any does. */
	printf("%d breakpoints, %d divisions\n", breakpoints, divisions);
	return fflush(stdout) != 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Interrupt handlers: int3, divide error, #UD, #GP, single step, software vector. */
#include <stdio.h>
#include <stddef.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_intr:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)

static volatile int nbp, nde, nud, ngp, ndb, nsoft;
static volatile uint64_t bp_rip, bp_cs, de_rip, gp_err, bp_rsp, bp_r15;
static int step;

static void on_bp(struct dune_tf *tf)
{
	nbp++;
	bp_rip = tf->rip;
	bp_cs = tf->cs;
	bp_rsp = tf->rsp;
	bp_r15 = tf->r15;
	tf->rax = ARG0(tf) + ARG1(tf) + ARG2(tf) + ARG3(tf) + ARG4(tf) + ARG5(tf);
	tf->r15 = 0x1515;
	if (step)
		tf->rflags |= 0x100;	/* TF */
}
static void on_de(struct dune_tf *tf) { nde++; de_rip = tf->rip; tf->rip += 2; tf->rax = 0xdead; }
static void on_ud(struct dune_tf *tf) { nud++; tf->rip += 2; }
static void on_gp(struct dune_tf *tf) { ngp++; gp_err = tf->err; tf->rip += 3; tf->rbx = 77; }
static void on_db(struct dune_tf *tf) { if (++ndb == 4) tf->rflags &= ~0x100UL; }
static void on_soft(struct dune_tf *tf) { nsoft++; }

int main(void)
{
	uint64_t a, r, here, sp;
	int i;

	CHECK(sizeof(struct dune_tf) == 168);
	CHECK(offsetof(struct dune_tf, rax) == 14 * 8 && offsetof(struct dune_tf, err) == 120);
	CHECK(offsetof(struct dune_tf, rip) == 128 && offsetof(struct dune_tf, ss) == 160);
	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	CHECK(dune_register_intr_handler(T_BRKPT, on_bp) == 0);
	CHECK(dune_register_intr_handler(T_DIVIDE, on_de) == 0);
	CHECK(dune_register_intr_handler(T_ILLOP, on_ud) == 0);
	CHECK(dune_register_intr_handler(T_GPFLT, on_gp) == 0);
	CHECK(dune_register_intr_handler(T_DEBUG, on_db) == 0);
	CHECK(dune_register_intr_handler(0x63, on_soft) == 0);
	CHECK(dune_register_intr_handler(-1, on_soft) < 0);
	CHECK(dune_register_intr_handler(100000, on_soft) < 0);

	for (i = 0; i < 100; i++) {
		register uint64_t r8 asm("r8") = 16, r9 asm("r9") = 32, r15 asm("r15") = 4711;
		uint64_t di = 1, si = 2, dx = 4, cx = 8;
		asm volatile("lea 1f(%%rip), %%rbx\n\tmov %%rsp, %%r14\n\tint3\n1:\tmov %%r14, %1"
			: "=a"(a), "=r"(sp), "=&b"(here), "+D"(di), "+S"(si), "+d"(dx), "+c"(cx),
			  "+r"(r8), "+r"(r9), "+r"(r15) : : "r14", "memory", "cc");
		CHECK(a == 63);
		CHECK(bp_rip == here);
		CHECK(bp_rsp == sp);
		CHECK(bp_r15 == 4711 && r15 == 0x1515);
	}
	CHECK(nbp == 100);
	CHECK(bp_cs == GD_KT);

	asm volatile("lea 1f(%%rip), %1\n\txor %%ecx, %%ecx\n\tmov $8, %%eax\n1:\tdiv %%cl"
		: "=&a"(a), "=&r"(here) : : "rcx", "cc", "memory");
	CHECK(nde == 1 && a == 0xdead && de_rip == here);
	asm volatile("ud2" ::: "memory");
	CHECK(nud == 1);
	a = 0x8000000000000000UL;
	asm volatile("mov (%%rax), %%rbx" : "=&b"(r) : "a"(a) : "memory");
	CHECK(ngp == 1 && r == 77 && gp_err == 0);
	asm volatile("int $0x63\n\tint $0x63" ::: "memory");
	CHECK(nsoft == 2);

	/* single step from a handler's change of rflags */
	step = 1;
	asm volatile("int3\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop\n\tnop" ::: "rax", "r15", "memory", "cc");
	CHECK(ndb == 4);
	if (!bad)
		printf("ok ci_intr\n");
	return bad;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * x87, SSE and AVX registers around handlers: those of interrupted code stay, whatever a handler does to its own.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"
#include "libdune/fpu.h"

#define STACK 65536
#define SYS_DONE 1000
#define SYS_STATE 1001
#define ALL "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define MXCSR 0x1f80

/* Registers of some code. */
struct state {
	/* YMM where there is AVX, else their lower halves. */
	uint64_t vector[16][4];
	long double st0;
	uint32_t mxcsr, control;
};

_Static_assert(offsetof(struct state, st0) == 512 && offsetof(struct state, control) == 532, "see AROUND");

static char *stack;
static uint32_t has_avx;
static const uint32_t initial_mxcsr = MXCSR;
static struct state own, left, handlers;
static struct fpu_area seen;
static int handled;

/* Loads the registers from RBX, does something, and stores them to R12. */
#define AROUND(what)                                                                                                  \
	__asm__ volatile("cmpl $0, %[avx]\n\t"                                                                         \
			 "jne 1f\n\t"                                                                                  \
			 ".irp r," ALL "\n\tmovups 32*\\r(%%rbx), %%xmm\\r\n\t.endr\n\t"                               \
			 "jmp 2f\n"                                                                                    \
			 "1: .irp r," ALL "\n\tvmovups 32*\\r(%%rbx), %%ymm\\r\n\t.endr\n"                             \
			 "2: fninit\n\t"                                                                               \
			 "fldcw 532(%%rbx)\n\t"                                                                        \
			 "fldt 512(%%rbx)\n\t"                                                                         \
			 "ldmxcsr 528(%%rbx)\n\t" what "\n\t"                                                          \
			 "cmpl $0, %[avx]\n\t"                                                                         \
			 "jne 3f\n\t"                                                                                  \
			 ".irp r," ALL "\n\tmovups %%xmm\\r, 32*\\r(%%r12)\n\t.endr\n\t"                               \
			 "jmp 4f\n"                                                                                    \
			 "3: .irp r," ALL "\n\tvmovups %%ymm\\r, 32*\\r(%%r12)\n\t.endr\n\t"                           \
			 "vzeroupper\n"                                                                                \
			 "4: stmxcsr 528(%%r12)\n\t"                                                                   \
			 "fnstcw 532(%%r12)\n\t"                                                                       \
			 "fstpt 512(%%r12)\n\t"                                                                        \
			 "fninit\n\t"                                                                                  \
			 "ldmxcsr %[initial]"                                                                          \
			 : "+a"(rax)                                                                                   \
			 : "b"(&own), "r"(before), [avx] "m"(has_avx), [initial] "m"(initial_mxcsr), "S"(page)         \
			 : "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",     \
			   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

static void fill(struct state *state, uint64_t seed)
{
	int i, j;

	memset(state, 0, sizeof(*state));
	for (i = 0; i < 16; i++)
		for (j = 0; j < (has_avx ? 4 : 2); j++)
			state->vector[i][j] = seed * 0x0101010101010101 + 16 * i + j;
	state->st0 = seed + 0.5L;
	/* Rounds down, rounds up: neither is what a program starts with. */
	state->mxcsr = seed & 1 ? MXCSR | 0x2000 : MXCSR | 0x4000;
	state->control = seed & 1 ? 0x77f : 0xb7f;
}

static int same(const struct state *a, const struct state *b)
{
	return memcmp(a->vector, b->vector, sizeof(a->vector)) == 0 && a->st0 == b->st0 && a->mxcsr == b->mxcsr &&
	       a->control == b->control;
}

/* What a handler may do with its own registers, and then some. */
static void spoil(void)
{
	dune_fpu_save(&seen);
	handled++;
	__asm__ volatile("cmpl $0, %[avx]\n\t"
			 "jne 1f\n\t"
			 ".irp r," ALL "\n\tmovups 32*\\r(%[from]), %%xmm\\r\n\t.endr\n\t"
			 "jmp 2f\n"
			 "1: .irp r," ALL "\n\tvmovups 32*\\r(%[from]), %%ymm\\r\n\t.endr\n"
			 "2: fninit\n\t"
			 ".rept 8\n\tfld1\n\t.endr\n\t"
			 "fldcw 532(%[from])\n\t"
			 "ldmxcsr 528(%[from])"
			 :
			 : [from] "r"(&handlers), [avx] "m"(has_avx)
			 : "memory");
}

static void on_syscall(struct dune_tf *tf)
{
	if (tf->rax == SYS_DONE)
		dune_ret_from_user(ARG0(tf));
	spoil();
	tf->rax = 0;
}

static void on_breakpoint(struct dune_tf *tf)
{
	(void)tf;
	spoil();
}

static void on_pgflt(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;

	(void)fec;
	(void)tf;
	spoil();
	if (dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte) != 0)
		dune_die();
	*pte |= PTE_P | PTE_W | PTE_U;
}

static void on_alarm(struct dune_tf *tf)
{
	(void)tf;
	spoil();
}

static volatile char *page;

static void protect(void)
{
	assert(dune_vm_mprotect(pgroot, (void *)page, PGSIZE, PERM_R | PERM_U) == 0);
}

static void calls(void)
{
	register struct state *before __asm__("r12") = &left;
	unsigned long rax = SYS_STATE;

	AROUND("syscall");
}

static void breaks(void)
{
	register struct state *before __asm__("r12") = &left;
	unsigned long rax = 0;

	AROUND("int3");
}

static void writes(void)
{
	register struct state *before __asm__("r12") = &left;
	unsigned long rax = 0;

	AROUND("movb $1, (%%rsi)");
}

/* Until a signal has had its handler. */
static void waits(void)
{
	register struct state *before __asm__("r12") = &left;
	unsigned long rax = (unsigned long)&handled;

	AROUND("9: pause\n\tcmpl $0, (%%rax)\n\tje 9b");
}

/* Registers as they are. */
static void begins(void)
{
	dune_fpu_save(&seen);
}

static void (*todo)(void);

static void user(void)
{
	unsigned long rax = SYS_DONE;

	todo();
	__asm__ volatile("syscall" : "+a"(rax) : "D"(7) : "rcx", "r11", "memory");
}

static void at_cpl3(void (*f)(void))
{
	struct dune_tf tf = { 0 };

	todo = f;
	tf.rip = (unsigned long)user;
	tf.rsp = (unsigned long)stack + STACK - 8;
	tf.rflags = 2;
	assert(dune_jump_to_user(&tf) == 7);
	__asm__ volatile("fninit\n\tldmxcsr %0" : : "m"(initial_mxcsr));
}

/* Whether dune_fpu_save found these. */
static int saved(const struct state *state)
{
	return memcmp(seen.xsave.fxsave.xmm_regs, state->vector[0], 16) == 0;
}

static void check(int is_cpl3)
{
	static void (*const all[])(void) = { calls, breaks, writes, waits };
	struct itimerval soon = { .it_value = { .tv_usec = 2000 } };
	unsigned int i;

	/* A system call of CPL0 is Linux'. */
	for (i = !is_cpl3; i < 4; i++) {
		handled = 0;
		fill(&own, 2 * i + 1);
		memset(&left, 0, sizeof(left));
		protect();
		if (all[i] == waits)
			assert(setitimer(ITIMER_REAL, &soon, NULL) == 0);
		if (is_cpl3)
			at_cpl3(all[i]);
		else
			all[i]();
		assert(handled == 1);
		assert(same(&left, &own));
		/* A handler has its own, where what is interrupted is at CPL3. */
		if (is_cpl3 && all[i] != waits)
			assert(!saved(&own));
	}
}

int main(void)
{
	static const char zero[256];
	int i;

	stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	page = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(stack != MAP_FAILED && page != MAP_FAILED);
	has_avx = dune_fpu_mask() >> 2;
	assert(dune_init_and_enter() == 0);
	dune_register_syscall_handler(on_syscall);
	dune_register_pgflt_handler(on_pgflt);
	assert(dune_register_intr_handler(T_BRKPT, on_breakpoint) == 0);
	assert(dune_register_signal_handler(SIGALRM, on_alarm) == 0);
	fill(&handlers, 100);

	check(0);
	check(1);

	/* A visit starts new, whatever CPL0 has. */
	for (i = 0; i < 2; i++) {
		fill(&own, 51);
		spoil();
		at_cpl3(begins);
		assert(seen.xsave.fxsave.mxcsr == MXCSR && seen.xsave.fxsave.cwd == 0x37f);
		assert(seen.xsave.fxsave.twd == 0);
		assert(memcmp(seen.xsave.fxsave.xmm_regs, zero, 256) == 0);
	}
	return 0;
}

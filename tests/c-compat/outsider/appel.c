/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The Appel-Li loops: trap, prot1-trap-unprot, protn-trap-unprot; vmcall getpid. */
#include <stdio.h>
#include <stdint.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_appel:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define N 100
#define ROUNDS 20
static char *mem;
static volatile int nflt, wrong;
static volatile unsigned long t_store, t_trap;
static int order[N];

static inline unsigned long stop(void)
{
	unsigned a, d;
	asm volatile("rdtscp" : "=a"(a), "=d"(d) : : "rcx", "memory");
	return a | (unsigned long)d << 32;
}
static void h_trap(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	t_trap += stop() - t_store;
	nflt++;
	tf->rip += 3;		/* movb $n,(%rax) */
}
static void h_appel1(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;
	char *other;

	if (addr != (uintptr_t)mem + order[nflt] * PGSIZE + 8)
		wrong++;
	nflt++;
	if (dune_vm_lookup(pgroot, (void *)addr, 0, &pte))
		wrong++;
	*pte |= PTE_P | PTE_W | PTE_U | PTE_A | PTE_D;
	dune_flush_tlb_one(addr);
	other = mem + (N + order[nflt - 1]) * PGSIZE;	/* PROT1 */
	if (dune_vm_lookup(pgroot, other, 0, &pte))
		wrong++;
	*pte = PTE_ADDR(*pte) | PTE_P | PTE_NX;
	dune_flush_tlb_one((uintptr_t)other);
}
static void h_appel2(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	if (addr != (uintptr_t)mem + order[nflt] * PGSIZE + 8 || fec != 3)
		wrong++;
	nflt++;
	if (dune_vm_mprotect(pgroot, (void *)(addr & ~(PGSIZE - 1UL)), PGSIZE, PERM_R | PERM_W))
		wrong++;
}

int main(void)
{
	unsigned long t, trap, a1 = 0, a2 = 0, pid, sc = 0;
	ptent_t *pte;
	int i, r, j;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	mem = mmap(NULL, 2 * N * PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (i = 0; i < 2 * N; i++)
		mem[i * PGSIZE] = i;
	for (i = 0; i < N; i++)
		order[i] = (i * 37) % N;

	for (i = 0; i < 1000; i++) {
		t = dune_get_ticks();
		asm volatile("vmcall" : "=a"(pid) : "a"(39) : "rcx", "r11", "memory");
		sc += stop() - t;
		CHECK(pid == (unsigned long)getpid());
	}

	dune_register_pgflt_handler(h_trap);
	CHECK(dune_vm_mprotect(pgroot, mem, 2 * N * PGSIZE, PERM_R) == 0);
	for (i = 0; i < 1000; i++) {
		t_store = dune_get_ticks();
		asm volatile("movb $66, (%%rax)" : : "a"(mem + (i % N) * PGSIZE) : "memory");
	}
	CHECK(nflt == 1000);
	trap = t_trap / 1000;
	for (i = 0; i < 2 * N; i++)
		CHECK(mem[i * PGSIZE] == (char)i);

	dune_register_pgflt_handler(h_appel1);
	for (r = 0; r < ROUNDS; r++) {
		CHECK(dune_vm_mprotect(pgroot, mem, N * PGSIZE, PERM_R) == 0);
		CHECK(dune_vm_mprotect(pgroot, mem + N * PGSIZE, N * PGSIZE, PERM_R | PERM_W) == 0);
		nflt = 0;
		t = dune_get_ticks();
		for (i = 0; i < N; i++)
			((volatile char *)mem)[order[i] * PGSIZE + 8] = r;
		a1 += stop() - t;
		CHECK(nflt == N && wrong == 0);
		for (i = 0; i < 2 * N; i++) {
			CHECK(dune_vm_lookup(pgroot, mem + i * PGSIZE, CREATE_NONE, &pte) == 0);
			CHECK(i < N ? (*pte & PTE_W) != 0 : !(*pte & PTE_W));
		}
	}
	dune_register_pgflt_handler(h_appel2);
	CHECK(dune_vm_mprotect(pgroot, mem + N * PGSIZE, N * PGSIZE, PERM_R | PERM_W) == 0);
	for (r = 0; r < ROUNDS; r++) {
		nflt = 0;
		t = dune_get_ticks();
		CHECK(dune_vm_mprotect(pgroot, mem, N * PGSIZE, PERM_R) == 0);
		for (i = 0; i < N; i++)
			((volatile char *)mem)[order[i] * PGSIZE + 8] = r + 1;
		a2 += stop() - t;
		CHECK(nflt == N && wrong == 0);
		for (j = 0; j < N; j++)
			CHECK(mem[j * PGSIZE + 8] == r + 1);
		for (j = 0; j < N; j++)		/* no further faults */
			((volatile char *)mem)[j * PGSIZE + 16] = 1;
		CHECK(nflt == N);
	}
	printf("vmcall %lu trap %lu appel1 %lu appel2 %lu\n", sc / 1000, trap, a1 / ROUNDS, a2 / ROUNDS);
	CHECK(trap > 0 && a1 > 0 && a2 > 0);
	if (!bad)
		printf("ok ci_appel\n");
	return bad;
}

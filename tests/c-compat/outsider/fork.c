/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* fork from Dune mode; the children call dune_enter, as the first Dune wanted, or not. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/wait.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_fork[%d]:%d: not: %s\n", getpid(), __LINE__, #c); bad = 1; } } while (0)
#define A 0x440000000000UL
static volatile int nbp, nflt;
static int global = 1;

static void on_bp(struct dune_tf *tf) { nbp++; }
static void on_pf(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;
	nflt++;
	if (dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte)) {
		dune_printf("no pte for %lx\n", addr);
		dune_die();
	}
	*pte |= PTE_W;
	dune_flush_tlb_one(addr);
}

static int child(int k, int enter, int wfd, int *heap)
{
	int st;
	pid_t g;

	nbp = nflt = 0;
	if (enter)
		CHECK(dune_enter() == 0);
	CHECK(global == 1 && heap[0] == 17);
	global = 100 + k;
	heap[0] = k;
	asm volatile("int3" ::: "memory");
	CHECK(nbp == 1);		/* still in Dune mode, handlers kept */
	CHECK(dune_vm_mprotect(pgroot, heap, PGSIZE, PERM_R) == 0);
	((volatile int *)heap)[1] = 5;
	CHECK(nflt == 1 && heap[1] == 5);
	CHECK(dune_vm_map_pages(pgroot, (void *)(A + 0x10000000), PGSIZE, PERM_R | PERM_W) == 0);
	*(volatile int *)(A + 0x10000000) = 3;
	g = fork();			/* a grandchild */
	if (g == 0) {
		if (enter)
			CHECK(dune_enter() == 0);
		asm volatile("int3" ::: "memory");
		CHECK(nbp == 2 && global == 100 + k);
		exit(bad ? 1 : 60 + k);
	}
	CHECK(g > 0 && waitpid(g, &st, 0) == g && WIFEXITED(st) && WEXITSTATUS(st) == 60 + k);
	CHECK(write(wfd, &k, sizeof k) == sizeof k);
	return bad ? 1 : 10 + k;
}

int main(void)
{
	int i, p[2], st, k, sum = 0, *heap;
	pid_t pid[6];

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	CHECK(dune_register_intr_handler(T_BRKPT, on_bp) == 0);
	dune_register_pgflt_handler(on_pf);
	heap = aligned_alloc(PGSIZE, PGSIZE);
	heap[0] = 17;
	asm volatile("int3" ::: "memory");
	CHECK(nbp == 1 && pipe(p) == 0);
	fflush(stdout);
	for (i = 0; i < 6; i++) {
		pid[i] = fork();
		CHECK(pid[i] >= 0);
		if (pid[i] == 0)
			exit(child(i, i & 1, p[1], heap));
	}
	for (i = 0; i < 6; i++) {
		CHECK(read(p[0], &k, sizeof k) == sizeof k);
		sum += k;
	}
	CHECK(sum == 15);
	for (i = 0; i < 6; i++)
		CHECK(waitpid(pid[i], &st, 0) == pid[i] && WIFEXITED(st) && WEXITSTATUS(st) == 10 + i);
	CHECK(global == 1 && heap[0] == 17);
	((volatile int *)heap)[1] = 6;
	CHECK(nflt == 0);		/* the children's mprotect is not ours */
	asm volatile("int3" ::: "memory");
	CHECK(nbp == 2);
	if (!bad)
		printf("ok ci_fork\n");
	return bad;
}

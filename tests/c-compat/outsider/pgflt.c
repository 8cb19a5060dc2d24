/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A page-fault handler that edits PTEs it finds with dune_vm_lookup; demand paging. */
#include <stdio.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_pgflt:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define BASE 0x400000000000UL
#define LAZY 0x410000000000UL
#define N 64
static volatile int nflt, nlazy, lookup_failed;
static volatile uintptr_t last;
static volatile uint64_t lastfec;
static char own[4 * PGSIZE] __attribute__((aligned(PGSIZE)));

static void handler(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;

	nflt++;
	last = addr;
	lastfec = fec;
	if (addr >= LAZY && addr < LAZY + N * PGSIZE) {
		struct page *pg = dune_page_alloc();
		nlazy++;
		if (!pg || dune_vm_insert_page(pgroot, (void *)(addr & ~(PGSIZE - 1UL)), pg, PERM_R | PERM_W)) {
			dune_printf("insert failed\n");
			dune_die();
		}
		return;
	}
	if (dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte)) {
		lookup_failed = 1;
		dune_printf("lookup %lx failed, rip %lx\n", addr, tf->rip);
		dune_dump_trap_frame(tf);
		dune_die();
	}
	*pte |= PTE_P | PTE_W | PTE_U;
	dune_flush_tlb_one(addr);
}

int main(void)
{
	volatile char *p = (char *)BASE, *q;
	ptent_t *pte;
	int i;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	dune_register_pgflt_handler(handler);

	CHECK(dune_vm_map_pages(pgroot, (void *)BASE, N * PGSIZE, PERM_R | PERM_W) == 0);
	for (i = 0; i < N; i++)
		p[i * PGSIZE] = i;
	CHECK(nflt == 0);
	for (i = 0; i < N; i++) {	/* odd pages: read only; even: not present */
		CHECK(dune_vm_lookup(pgroot, (void *)(p + i * PGSIZE + 5), CREATE_NONE, &pte) == 0);
		CHECK((*pte & PTE_P) && (*pte & PTE_W) && (*pte & PTE_NX));
		*pte &= (i & 1) ? ~(ptent_t)PTE_W : ~(ptent_t)PTE_P;
		dune_flush_tlb_one((unsigned long)p + i * PGSIZE);
	}
	for (i = 0; i < N; i++) {
		CHECK(!(i & 1) || p[i * PGSIZE] == (char)i);	/* a read of a read-only page: no fault */
		CHECK(nflt == i);
		p[i * PGSIZE + 7] = 3;
		CHECK(nflt == i + 1);
		CHECK(last == BASE + i * PGSIZE + 7);
		CHECK(lastfec == ((i & 1) ? 3 : 2));
		CHECK(p[i * PGSIZE] == (char)i && p[i * PGSIZE + 7] == 3);
	}

	/* one page inside an array of the program itself */
	nflt = 0;
	CHECK(dune_vm_mprotect(pgroot, own + PGSIZE, PGSIZE, PERM_R) == 0);
	((volatile char *)own)[0] = 1;
	((volatile char *)own)[2 * PGSIZE] = 1;
	CHECK(nflt == 0);
	((volatile char *)own)[PGSIZE + 9] = 1;
	CHECK(nflt == 1 && last == (uintptr_t)own + PGSIZE + 9);

	/* one page in the middle of a big mmap, all access taken away, contents survive */
	nflt = 0;
	q = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(q != MAP_FAILED);
	for (i = 0; i < 8 << 20; i += PGSIZE)
		q[i] = i >> 12;
	CHECK(nflt == 0);
	CHECK(dune_vm_mprotect(pgroot, (void *)(q + (5 << 20)), PGSIZE, PERM_NONE) == 0);
	for (i = 0; i < 8 << 20; i += PGSIZE)
		CHECK(q[i] == (char)(i >> 12));
	CHECK(nflt == 1 && last == (uintptr_t)q + (5 << 20) && lastfec == 0);

	/* demand paging */
	nflt = 0;
	for (i = N - 1; i >= 0; i--)
		*(volatile long *)(LAZY + i * PGSIZE + 16) = i;
	for (i = 0; i < N; i++)
		CHECK(*(volatile long *)(LAZY + i * PGSIZE + 16) == i);
	CHECK(nlazy == N && nflt == N && !lookup_failed);
	if (!bad)
		printf("ok ci_pgflt\n");
	return bad;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* map_phys aliases, unmap, page_walk, clone + load_cr3 + copy on write, free. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_vm:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define A 0x420000000000UL
#define B 0x430000000000UL
#define N 40
static char data[PGSIZE] __attribute__((aligned(PGSIZE)));
static volatile int nflt, cow;
static volatile uintptr_t last;
static ptent_t *cur;

static void handler(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;
	nflt++;
	last = addr;
	if (cow && dune_vm_lookup(cur, (void *)addr, CREATE_NONE, &pte) == 0 && (*pte & PTE_COW)) {
		cow++;
		dune_vm_default_pgflt_handler(addr, fec);
		return;
	}
	tf->rip += 3;		/* mov (%rax),%rcx */
	tf->rcx = 0xbad;
}

static unsigned long probe(unsigned long va)
{
	unsigned long r;
	asm volatile("mov (%%rax), %%rcx" : "=c"(r) : "a"(va) : "memory");
	return r;
}

static int count(const void *arg, ptent_t *pte, void *va)
{
	int *n = (int *)arg;
	if ((unsigned long)va != A + n[0] * PGSIZE || !(*pte & PTE_P))
		n[1]++;
	n[0]++;
	return n[0] == n[2] ? 99 : 0;
}
static int clearw(const void *arg, ptent_t *pte, void *va) { *pte &= ~(ptent_t)PTE_W; return 0; }

int main(void)
{
	char onstack[2 * PGSIZE], *sp, *m;
	volatile long *p = (long *)A;
	ptent_t *pte, *root;
	int i, n[3];

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	dune_register_pgflt_handler(handler);

	/* aliases of static data, of mmap, of the stack */
	m = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	sp = (char *)(((unsigned long)onstack + PGSIZE - 1) & ~(PGSIZE - 1UL));
	strcpy(m, "mmap"); strcpy(data, "data"); strcpy(sp, "stack");
	CHECK(dune_va_to_pa(m) == dune_mmap_addr_to_pa(m));
	CHECK(dune_va_to_pa(sp) == dune_stack_addr_to_pa(sp));
	CHECK(dune_vm_map_phys(pgroot, (void *)B, PGSIZE, (void *)dune_va_to_pa(m), PERM_R | PERM_W) == 0);
	CHECK(dune_vm_map_phys(pgroot, (void *)(B + PGSIZE), PGSIZE, (void *)dune_va_to_pa(data), PERM_R | PERM_W) == 0);
	CHECK(dune_vm_map_phys(pgroot, (void *)(B + 2 * PGSIZE), PGSIZE, (void *)dune_va_to_pa(sp), PERM_R | PERM_W) == 0);
	CHECK(!strcmp((char *)B, "mmap") && !strcmp((char *)B + PGSIZE, "data") && !strcmp((char *)B + 2 * PGSIZE, "stack"));
	((volatile char *)B)[0] = 'M'; ((volatile char *)B)[PGSIZE] = 'D'; ((volatile char *)B)[2 * PGSIZE] = 'S';
	asm volatile("" ::: "memory");
	CHECK(m[0] == 'M' && data[0] == 'D' && sp[0] == 'S');

	/* fresh pages, page walk */
	CHECK(dune_vm_map_pages(pgroot, (void *)A, N * PGSIZE, PERM_R | PERM_W) == 0);
	for (i = 0; i < N; i++)
		p[i * 512] = 1000 + i;
	memset(n, 0, sizeof n);
	CHECK(dune_vm_page_walk(pgroot, (void *)A, (void *)(A + N * PGSIZE - 1), count, n) == 0);
	CHECK(n[0] == N && n[1] == 0);
	n[0] = n[1] = 0; n[2] = 7;
	CHECK(dune_vm_page_walk(pgroot, (void *)A, (void *)(A + N * PGSIZE - 1), count, n) == 99);
	CHECK(n[0] == 7);
	CHECK(dune_vm_page_walk(pgroot, (void *)(A + 3 * PGSIZE), (void *)(A + 4 * PGSIZE - 1), clearw, NULL) == 0);
	dune_flush_tlb();
	CHECK(dune_vm_lookup(pgroot, (void *)(A + 3 * PGSIZE), CREATE_NONE, &pte) == 0 && !(*pte & PTE_W));
	CHECK(dune_vm_lookup(pgroot, (void *)(A + 4 * PGSIZE), CREATE_NONE, &pte) == 0 && (*pte & PTE_W));
	CHECK(probe(A + 3 * PGSIZE) == 1003 && nflt == 0);
	CHECK(dune_vm_mprotect(pgroot, (void *)A, N * PGSIZE, PERM_R | PERM_W) == 0);
	p[3 * 512] = 1003;
	CHECK(nflt == 0);

	/* unmap in the middle */
	dune_vm_unmap(pgroot, (void *)(A + 10 * PGSIZE), 5 * PGSIZE);
	CHECK(probe(A + 9 * PGSIZE) == 1009 && probe(A + 15 * PGSIZE) == 1015 && nflt == 0);
	for (i = 10; i < 15; i++)
		CHECK(probe(A + i * PGSIZE) == 0xbad && last == A + i * PGSIZE);
	CHECK(nflt == 5);
	CHECK(dune_vm_lookup(pgroot, (void *)0x4f0000000000, CREATE_NONE, &pte) != 0);

	/* clone: a second address space; what it changes in its own tables stays there */
	root = dune_vm_clone(pgroot);
	CHECK(root != NULL && root != pgroot);
	CHECK(dune_vm_map_pages(root, (void *)(A + 12 * PGSIZE), PGSIZE, PERM_R | PERM_W) == 0);
	nflt = 0;
	cow = 1;
	cur = root;
	load_cr3((unsigned long)root);
	p[12 * 512] = 5;
	CHECK(probe(A + 12 * PGSIZE) == 5);
	CHECK(probe(A + 20 * PGSIZE) == 1020);
	load_cr3((unsigned long)pgroot);
	cur = pgroot;
	CHECK(probe(A + 12 * PGSIZE) == 0xbad);
	CHECK(probe(A + 20 * PGSIZE) == 1020);
	dune_vm_free(root);
	for (i = 0; i < N; i++)
		CHECK(i >= 10 && i < 15 ? 1 : probe(A + i * PGSIZE) == 1000 + i);
	if (!bad)
		printf("ok ci_vm\n");
	return bad;
}

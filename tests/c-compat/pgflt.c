/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Page faults: the handler finds the entry of the page and edits it.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

#define NRPGS 100
/* Where the process has nothing. */
#define MAP_ADDR 0x400000000000

static int faults;
static uintptr_t last_addr;
static uint64_t last_fec;
static char *mem;

static ptent_t *entry(void *va)
{
	ptent_t *pte;

	assert(dune_vm_lookup(pgroot, va, CREATE_NONE, &pte) == 0);
	return pte;
}

static void allow(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	(void)tf;
	faults++;
	last_addr = addr;
	last_fec = fec;
	*entry((void *)addr) |= PTE_P | PTE_W;
}

/* PROT1, TRAP, UNPROT: makes this page writable and takes another one away. */
static void allow_one_take_one(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *other;

	allow(addr, fec, tf);
	other = entry((void *)(addr + NRPGS * PGSIZE));
	*other = PTE_ADDR(*other);
	dune_flush_tlb_one(addr + NRPGS * PGSIZE);
}

static void skip(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	faults++;
	last_addr = addr;
	last_fec = fec;
	/* "movb $1, (%rdi)" is three bytes long. */
	tf->rip += 3;
}

static void copy(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	(void)tf;
	faults++;
	dune_vm_default_pgflt_handler(addr, fec);
}

static void count_vector(struct dune_tf *tf)
{
	faults++;
	tf->rip += 3;
}

static void store(void *p)
{
	__asm__ volatile("movb $1, (%%rdi)" : : "D"(p) : "memory");
}

static void test_fresh_pages(void)
{
	char *p = (char *)MAP_ADDR;

	dune_register_pgflt_handler(allow);
	assert(dune_vm_map_pages(pgroot, p, 2 * PGSIZE, PERM_R) == 0);
	assert(p[0] == 0 && p[2 * PGSIZE - 1] == 0 && faults == 0);
	p[5] = 42;
	assert(faults == 1 && last_addr == MAP_ADDR + 5);
	assert(last_fec == (FEC_P | FEC_W));
	assert(p[5] == 42);
	p[6] = 43;
	assert(faults == 1);
	p[PGSIZE] = 1;
	assert(faults == 2 && last_addr == MAP_ADDR + PGSIZE);
}

static void test_entries_written_by_hand(void)
{
	char *p = (char *)MAP_ADDR;
	ptent_t *pte = entry(p), old = *pte;

	faults = 0;
	/* Nothing at all. */
	dune_register_pgflt_handler(skip);
	*pte = 0;
	dune_flush_tlb_one(MAP_ADDR);
	store(p);
	assert(faults == 1 && last_fec == FEC_W);
	/* Not present, but its address is kept. */
	*pte = old & ~PTE_P;
	dune_register_pgflt_handler(allow);
	p[7] = 44;
	assert(faults == 2 && p[5] == 42 && p[7] == 44);
	/* Accessed and dirty. */
	*pte &= ~(PTE_A | PTE_D);
	dune_flush_tlb();
	(void)*(volatile char *)p;
	assert((*pte & (PTE_A | PTE_D)) == PTE_A);
	p[8] = 45;
	assert((*pte & (PTE_A | PTE_D)) == (PTE_A | PTE_D));
}

/* The same on memory of the process, which large pages map at first. */
static void test_memory_of_the_process(void)
{
	int i;

	mem = mmap(NULL, 2 * NRPGS * PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(mem != MAP_FAILED);
	memset(mem, 7, 2 * NRPGS * PGSIZE);
	faults = 0;
	dune_register_pgflt_handler(allow_one_take_one);
	assert(dune_vm_mprotect(pgroot, mem, NRPGS * PGSIZE, PERM_R) == 0);
	for (i = 0; i < NRPGS; i++)
		mem[i * PGSIZE] = i;
	assert(faults == NRPGS);
	dune_register_pgflt_handler(allow);
	for (i = 0; i < NRPGS; i++) {
		assert(mem[i * PGSIZE] == i && mem[i * PGSIZE + 1] == 7);
		assert(mem[(NRPGS + i) * PGSIZE] == 7);
	}
	assert(faults == 2 * NRPGS);
	/* PROTN, TRAP, UNPROT. */
	faults = 0;
	assert(dune_vm_mprotect(pgroot, mem, NRPGS * PGSIZE, PERM_R) == 0);
	for (i = 0; i < NRPGS; i++)
		mem[i * PGSIZE] = i + 1;
	assert(faults == NRPGS && mem[99 * PGSIZE] == 100);
	/* No access at all, and back. */
	assert(dune_vm_mprotect(pgroot, mem, PGSIZE, PERM_NONE) == 0);
	dune_register_pgflt_handler(skip);
	store(mem);
	assert(faults == NRPGS + 1 && last_fec == FEC_W);
	assert(dune_vm_mprotect(pgroot, mem, PGSIZE, PERM_R | PERM_W) == 0);
	assert(mem[0] == 1);
}

static void test_what_the_process_has_not(void)
{
	faults = 0;
	dune_register_pgflt_handler(skip);
	store((void *)8);
	assert(faults == 1 && last_addr == 8);
	store((void *)0x300000001000);
	assert(faults == 2 && last_addr == 0x300000001000);
	/* Any number of times, as long as the program goes on in between. */
	for (int i = 0; i < 40; i++)
		store((void *)8);
	assert(faults == 42);
}

static void test_copy_on_write(void)
{
	char *p = (char *)MAP_ADDR + 16 * PGSIZE, *q = (char *)MAP_ADDR + 17 * PGSIZE;
	struct page *pg;

	faults = 0;
	dune_register_pgflt_handler(copy);
	assert(dune_vm_map_pages(pgroot, p, PGSIZE, PERM_R | PERM_W) == 0);
	strcpy(p, "shared");
	pg = dune_vm_lookup_page(pgroot, p);
	assert(pg && dune_vm_insert_page(pgroot, q, pg, PERM_R | PERM_W | PERM_COW) == 0);
	assert(dune_vm_mprotect(pgroot, p, PGSIZE, PERM_R | PERM_W | PERM_COW) == 0);
	assert(pg->ref == 2 && strcmp(q, "shared") == 0);
	/* The first write gets a copy, the second one has the page for itself. */
	strcpy(q, "copied");
	assert(faults == 1 && strcmp(p, "shared") == 0 && strcmp(q, "copied") == 0);
	assert(dune_vm_lookup_page(pgroot, q) != pg && pg->ref == 1);
	strcpy(p, "own");
	assert(faults == 2 && dune_vm_lookup_page(pgroot, p) == pg);
	assert(strcmp(p, "own") == 0 && strcmp(q, "copied") == 0);
	assert(!(*entry(p) & PTE_COW) && (*entry(p) & PTE_W));
	/* Memory of the process: others see what was there. */
	assert(dune_vm_mprotect(pgroot, mem, PGSIZE, PERM_R | PERM_COW) == 0);
	mem[1] = 99;
	assert(faults == 3 && mem[1] == 99 && dune_vm_lookup_page(pgroot, mem));
}

static void test_vector_comes_first(void)
{
	faults = 0;
	dune_register_pgflt_handler(allow);
	assert(dune_register_intr_handler(T_PGFLT, count_vector) == 0);
	store((void *)8);
	assert(faults == 1);
	assert(dune_register_intr_handler(T_PGFLT, NULL) == 0);
}

int main(void)
{
	assert(dune_init(true) == 0);
	assert(dune_enter() == 0);
	test_fresh_pages();
	test_entries_written_by_hand();
	test_memory_of_the_process();
	test_what_the_process_has_not();
	test_copy_on_write();
	test_vector_comes_first();
	return 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Page tables: mapping, protecting, unmapping, looking up, walking, cloning, loading.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "libdune/dune.h"

#define BASE 0x400000000000
#define BIG (2UL << 20)

static int faults;

struct count {
	int pages;
	int limit;
	ptent_t set;
	char *first, *last;
};

static void skip(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	(void)addr;
	(void)fec;
	faults++;
	/* "mov (%rdi), %al" and "mov %al, (%rdi)" are two bytes long. */
	tf->rip += 2;
}

static int load(void *p)
{
	int value = -1;

	__asm__ volatile("mov (%%rdi), %%al" : "+a"(value) : "D"(p) : "memory");
	return value & 0xff;
}

static int can_load(void *p)
{
	int before = faults;

	load(p);
	return faults == before;
}

static int can_store(void *p)
{
	int before = faults;

	__asm__ volatile("mov %%al, (%%rdi)" : : "a"(1), "D"(p) : "memory");
	return faults == before;
}

static int count_pages(const void *arg, ptent_t *pte, void *va)
{
	struct count *count = (struct count *)arg;

	assert(*pte & PTE_P);
	if (!count->pages)
		count->first = va;
	count->last = va;
	*pte |= count->set;
	return ++count->pages == count->limit ? 77 : 0;
}

static ptent_t *look_up(ptent_t *root, void *va)
{
	ptent_t *pte = NULL;

	assert(dune_vm_lookup(root, va, CREATE_NONE, &pte) == 0);
	return pte;
}

static char *anonymous(size_t bytes)
{
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert(p != MAP_FAILED);
	memset(p, 1, 64 * PGSIZE < bytes ? 64 * PGSIZE : bytes);
	return p;
}

static void test_map_and_unmap(void)
{
	char *p = (char *)BASE, *memory = anonymous(4 * PGSIZE);
	ptent_t *pte;

	assert(dune_vm_lookup(pgroot, p, CREATE_NONE, &pte) == -ENOENT);
	assert(!can_load(p));
	/* Fresh pages. */
	assert(dune_vm_map_pages(pgroot, p, 3 * PGSIZE, PERM_R | PERM_W) == 0);
	assert(can_store(p) && can_store(p + 2 * PGSIZE) && !can_load(p + 3 * PGSIZE));
	assert(p[0] == 1 && p[PGSIZE] == 0);
	/* Other memory of the process under another address, read and write, then read only. */
	memory[3 * PGSIZE] = 9;
	assert(dune_vm_map_phys(pgroot, p + 8 * PGSIZE, 4 * PGSIZE, (void *)dune_va_to_pa(memory),
				PERM_R | PERM_W) == 0);
	assert(p[11 * PGSIZE] == 9);
	p[8 * PGSIZE + 5] = 6;
	assert(memory[5] == 6);
	assert(dune_mmap_addr_to_pa(memory) == dune_va_to_pa(memory));
	assert(PTE_ADDR(*look_up(pgroot, p + 9 * PGSIZE)) == dune_va_to_pa(memory + PGSIZE));
	assert(PTE_ADDR(*look_up(pgroot, memory + PGSIZE)) == dune_va_to_pa(memory + PGSIZE));
	assert(dune_vm_mprotect(pgroot, p + 8 * PGSIZE, 4 * PGSIZE, PERM_R) == 0);
	assert(can_load(p + 8 * PGSIZE) && !can_store(p + 8 * PGSIZE) && can_store(memory));
	/* Gone, here and only here. */
	dune_vm_unmap(pgroot, p + 8 * PGSIZE, 4 * PGSIZE);
	assert(!can_load(p + 8 * PGSIZE) && !can_load(p + 11 * PGSIZE) && can_load(memory));
	dune_vm_unmap(pgroot, p, 3 * PGSIZE);
	assert(!can_load(p) && !can_load(p + 2 * PGSIZE));
	/* The program's own memory can go, too, and does not come back by itself. */
	dune_vm_unmap(pgroot, memory, PGSIZE);
	assert(!can_load(memory) && can_load(memory + PGSIZE));
	assert(dune_vm_map_phys(pgroot, memory, PGSIZE, (void *)dune_va_to_pa(memory), PERM_R | PERM_W) == 0);
	assert(load(memory) == 1);
	/* Bad calls. */
	assert(dune_vm_mprotect(NULL, p, PGSIZE, PERM_R) < 0);
	assert(dune_vm_map_pages(pgroot + 1, p, PGSIZE, PERM_R) < 0);
	assert(dune_vm_map_pages(pgroot, (void *)0x800000000000, PGSIZE, PERM_R) < 0);
	assert(dune_vm_insert_page(pgroot, p, NULL, PERM_R) < 0);
}

static void test_lookup_creates(void)
{
	char *p = (char *)BASE + (3UL << 30), *memory = anonymous(PGSIZE);
	ptent_t *pte;

	memory[4] = 4;
	assert(dune_vm_lookup(pgroot, p, CREATE_NONE, &pte) == -ENOENT);
	assert(dune_vm_lookup(pgroot, p, CREATE_NORMAL, &pte) == 0 && *pte == 0);
	*pte = dune_va_to_pa(memory) | PTE_P;
	assert(p[4] == 4 && !can_store(p));
	assert(look_up(pgroot, p) == pte);
	assert(dune_vm_lookup(pgroot, p, CREATE_BIG, &pte) == -EEXIST);
	assert(dune_vm_lookup(pgroot, p + BIG, CREATE_BIG, &pte) == 0);
	assert(dune_vm_lookup(pgroot, p + (1UL << 30), CREATE_BIG_1GB, &pte) == 0);
}

static void test_big_pages(void)
{
	char *p = (char *)BASE + (5UL << 30), *memory = anonymous(3 * BIG), *big;
	ptent_t *pte;

	big = (char *)(((unsigned long)memory + BIG - 1) & ~(BIG - 1));
	big[0] = 1;
	big[2 * PGSIZE] = 1;
	big[BIG + 3] = 3;
	assert(dune_vm_map_pages(pgroot, p, PGSIZE, PERM_R | PERM_W) == 0);
	assert(dune_vm_map_phys(pgroot, p, 2 * BIG, (void *)dune_va_to_pa(big), PERM_R | PERM_W | PERM_BIG) == 0);
	pte = look_up(pgroot, p + BIG);
	assert((*pte & PTE_PS) && PTE_ADDR(*pte) == dune_va_to_pa(big + BIG));
	assert(look_up(pgroot, p + BIG + PGSIZE) == pte);
	assert(p[BIG + 3] == 3 && load(p) == 1);
	/* It stays large: all of it changes. */
	assert(dune_vm_mprotect(pgroot, p, 2 * BIG, PERM_R) == 0);
	assert((*pte & PTE_PS) && can_load(p) && !can_store(p + BIG + 5 * PGSIZE));
	/* A page inside of it takes it to pieces. */
	assert(dune_vm_map_pages(pgroot, p + PGSIZE, PGSIZE, PERM_R) == 0);
	assert(load(p) == 1 && load(p + PGSIZE) == 0 && load(p + 2 * PGSIZE) == 1);
	assert(dune_vm_mprotect(pgroot, p + BIG + PGSIZE, PGSIZE, PERM_R | PERM_W) == 0);
	assert(!can_store(p + BIG) && can_store(p + BIG + PGSIZE) && !can_store(p + BIG + 2 * PGSIZE));
	assert(!(*look_up(pgroot, p + BIG) & PTE_PS));
	dune_vm_unmap(pgroot, p + BIG + 5 * PGSIZE, PGSIZE);
	assert(can_load(p + BIG + 4 * PGSIZE) && !can_load(p + BIG + 5 * PGSIZE) && can_load(p + BIG + 6 * PGSIZE));
}

static int has_huge_pages(void)
{
	unsigned int eax, ebx, ecx, edx;

	return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (edx & 1u << 26);
}

/* Pages of 1 GiB where the CPU has them, else of 2 MiB. */
static void test_huge_pages(void)
{
	const unsigned long gib = 1UL << 30;
	const int perm = PERM_R | PERM_W | PERM_BIG_1GB | PERM_BIG;
	char *p = (char *)BASE + (20UL << 30), *memory, *huge;
	ptent_t *pte, *other;
	unsigned long size;

	memory = mmap(NULL, 2 * gib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert(memory != MAP_FAILED);
	huge = (char *)(((unsigned long)memory + gib - 1) & ~(gib - 1));
	huge[1] = 1;
	huge[gib / 2] = 2;
	huge[gib - 1] = 3;
	/* Tables are there, which go. */
	assert(dune_vm_map_pages(pgroot, p + 3 * BIG, PGSIZE, PERM_R | PERM_W) == 0);
	assert(dune_vm_map_phys(pgroot, p, gib, (void *)dune_va_to_pa(huge), perm) == 0);
	pte = look_up(pgroot, p);
	assert((*pte & PTE_PS) && PTE_ADDR(*pte) == dune_va_to_pa(huge));
	size = look_up(pgroot, p + BIG) == pte ? gib : BIG;
	assert(size == (has_huge_pages() ? gib : BIG));
	assert(p[1] == 1 && p[gib / 2] == 2 && p[gib - 1] == 3);
	p[gib - 2] = 4;
	assert(huge[gib - 2] == 4);
	/* All of it, then one page of it. */
	assert(dune_vm_mprotect(pgroot, p, gib, PERM_R) == 0);
	assert(look_up(pgroot, p) == pte && (*pte & PTE_PS));
	assert(can_load(p) && !can_store(p) && !can_store(p + gib - 1));
	other = dune_vm_clone(pgroot);
	assert(other);
	assert(dune_vm_mprotect(pgroot, p + gib / 2, PGSIZE, PERM_R | PERM_W) == 0);
	assert(can_store(p + gib / 2) && !can_store(p + gib / 2 + PGSIZE) && !can_store(p) && !can_store(p + gib - 1));
	assert(!(*look_up(pgroot, p + gib / 2) & PTE_PS) && (*look_up(other, p + gib / 2) & PTE_PS));
	/* What is around it stays as large as it can be. */
	assert(*look_up(pgroot, p + gib / 2 + BIG) & PTE_PS);
	assert(p[1] == 1 && p[gib - 1] == 3);
	/* 2 MiB of other memory inside a large page of the program's. */
	assert(dune_vm_map_phys(other, p + 7 * BIG, BIG, (void *)dune_va_to_pa(huge + gib - BIG),
				PERM_R | PERM_BIG) == 0);
	assert(PTE_ADDR(*look_up(other, p + 7 * BIG)) == dune_va_to_pa(huge + gib - BIG));
	assert(PTE_ADDR(*look_up(other, p + 8 * BIG)) == dune_va_to_pa(huge + 8 * BIG));
	load_cr3((unsigned long)other);
	assert(p[8 * BIG - 1] == 3 && p[1] == 1 && p[gib - 1] == 3);
	load_cr3((unsigned long)pgroot);
	dune_vm_free(other);
	dune_vm_unmap(pgroot, p, gib);
	assert(!can_load(p) && !can_load(p + gib - 1) && huge[1] == 1);
	/* A walk of everything takes memory of the process to pages. */
	munmap(memory, 2 * gib);
}

static void test_walk(void)
{
	char *p = (char *)BASE + (7UL << 30), *memory = anonymous(64 * PGSIZE);
	struct count count = { 0 };

	assert(dune_vm_map_pages(pgroot, p, 10 * PGSIZE, PERM_R) == 0);
	assert(dune_vm_map_pages(pgroot, p + 20 * PGSIZE, 10 * PGSIZE, PERM_R) == 0);
	count.set = PTE_W;
	assert(dune_vm_page_walk(pgroot, p, p + 30 * PGSIZE - 1, count_pages, &count) == 0);
	assert(count.pages == 20 && count.first == p && count.last == p + 29 * PGSIZE);
	assert(can_store(p) && can_store(p + 29 * PGSIZE));
	/* A part, and an end before the end. */
	count = (struct count){ .limit = 4 };
	assert(dune_vm_page_walk(pgroot, p + 5 * PGSIZE, p + 30 * PGSIZE - 1, count_pages, &count) == 77);
	assert(count.pages == 4 && count.last == p + 8 * PGSIZE);
	/* Memory of the process, page by page. */
	count = (struct count){ 0 };
	assert(dune_vm_page_walk(pgroot, memory, memory + 64 * PGSIZE - 1, count_pages, &count) == 0);
	assert(count.pages == 64);
	/* Everything: all that the process and the program have mapped. */
	count = (struct count){ 0 };
	assert(dune_vm_page_walk(pgroot, VA_START, VA_END, count_pages, &count) == 0);
	assert(count.pages > 100 && count.pages < 1000000);
	assert(dune_vm_page_walk(pgroot, p, p - 1, count_pages, &count) < 0);
}

static void test_clone(void)
{
	char *p = (char *)BASE + (9UL << 30), *memory = anonymous(PGSIZE);
	struct page *pg;
	ptent_t *other;
	int i;

	assert(dune_vm_map_pages(pgroot, p, 2 * PGSIZE, PERM_R | PERM_W) == 0);
	pg = dune_vm_lookup_page(pgroot, p);
	assert(pg && pg->ref == 1);
	strcpy(p, "here");
	other = dune_vm_clone(pgroot);
	assert(other && other != pgroot);
	assert(pg->ref == 2 && dune_vm_lookup_page(other, p) == pg);
	assert(look_up(other, p) != look_up(pgroot, p));
	/* Another page there, with the same address. */
	assert(dune_vm_map_pages(other, p, PGSIZE, PERM_R | PERM_W) == 0);
	assert(pg->ref == 1);
	assert(dune_vm_mprotect(other, memory, PGSIZE, PERM_R) == 0);
	assert(can_store(memory));
	load_cr3((unsigned long)other | CR3_NOFLUSH | 1);
	strcpy(p, "there");
	i = can_store(memory);
	load_cr3((unsigned long)pgroot | CR3_NOFLUSH | 0);
	assert(i == 0 && strcmp(p, "here") == 0 && can_store(memory));
	/* An entry that is changed while the table is not loaded is seen when it is. */
	*look_up(other, memory) |= PTE_W;
	load_cr3((unsigned long)other);
	i = can_store(memory) && strcmp(p, "there") == 0;
	load_cr3((unsigned long)pgroot);
	assert(i);
	assert(dune_vm_lookup_page(other, p + PGSIZE)->ref == 2);
	dune_vm_free(other);
	assert(dune_vm_lookup_page(pgroot, p + PGSIZE)->ref == 1);
	/* Many of them. */
	for (i = 0; i < 3; i++) {
		other = dune_vm_clone(pgroot);
		assert(other);
		dune_vm_free(other);
	}
	dune_vm_unmap(pgroot, p, 2 * PGSIZE);
	assert(pg->ref == 0);
}

static void test_flushes(void)
{
	char *p = (char *)BASE + (11UL << 30);
	ptent_t *pte;

	assert(dune_vm_map_pages(pgroot, p, PGSIZE, PERM_R | PERM_W) == 0);
	/* Written to once: a VM exit by that would flush. */
	pte = look_up(pgroot, p);
	*pte |= PTE_W;
	assert(can_store(p));
	*pte &= ~PTE_W;
	dune_flush_tlb_one((unsigned long)p);
	assert(!can_store(p));
	*pte |= PTE_W;
	assert(can_store(p));
	*pte &= ~PTE_W;
	dune_flush_tlb();
	assert(!can_store(p));
	*pte |= PTE_W;
	assert(can_store(p));
	*pte &= ~PTE_W;
	__invpcid(0, (unsigned long)p);
	assert(!can_store(p));
}

/* A top table that the program makes of a page, with what pgroot has. */
static void test_table_by_hand(void)
{
	struct page *pg = dune_page_alloc();
	char *memory = anonymous(PGSIZE), *missing = (char *)BASE + (1UL << 45);
	int stored, loaded;

	assert(pg);
	memcpy((void *)dune_page2pa(pg), pgroot, PGSIZE);
	load_cr3(dune_page2pa(pg));
	stored = can_store(memory);
	loaded = can_load(missing);
	load_cr3((unsigned long)pgroot | CR3_NOFLUSH);
	assert(stored && !loaded);
	dune_page_put(pg);
}

static void test_stack_address(void)
{
	char here = 5, *p = (char *)BASE + (12UL << 30), *page = (char *)PGADDR(&here);

	assert(dune_stack_addr_to_pa(&here) == dune_va_to_pa(&here));
	assert(dune_vm_map_phys(pgroot, p, PGSIZE, (void *)dune_stack_addr_to_pa(page), PERM_R) == 0);
	assert(p[PGOFF(&here)] == 5);
}

int main(void)
{
	assert(dune_init_and_enter() == 0);
	dune_register_pgflt_handler(skip);
	test_map_and_unmap();
	test_lookup_creates();
	test_big_pages();
	test_huge_pages();
	test_walk();
	test_clone();
	test_flushes();
	test_table_by_hand();
	test_stack_address();
	return 0;
}

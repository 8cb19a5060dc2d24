/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The page pool: pages with users, their physical addresses, mapping them.
 */
#include <pthread.h>
#include <string.h>

#include "libdune/dune.h"

#include "capture.h"

#define THREADS 4
#define ROUNDS 200

static void *take_and_give(void *arg)
{
	unsigned long id = (unsigned long)arg;
	int i;

	for (i = 0; i < ROUNDS; i++) {
		struct page *pg = dune_page_alloc();
		volatile unsigned long *word;

		assert(pg && pg->ref == 1);
		word = (unsigned long *)dune_page2pa(pg);
		assert(*word == 0);
		*word = id;
		dune_page_get(pg);
		dune_page_put(pg);
		assert(*word == id);
		dune_page_put(pg);
	}
	return NULL;
}

/* As dune_page_stats writes them. */
static void count(unsigned long *used, unsigned long *unused)
{
	begin_capture();
	dune_page_stats();
	end_capture();
	assert(sscanf(captured, "dune: pages: %lu in use, %lu free\n", used, unused) == 2);
}

static void test_stats(void)
{
	unsigned long used, unused, used_more, unused_less;
	struct page *some[3];
	int i;

	count(&used, &unused);
	assert(used + unused == (unsigned long)num_pages);
	for (i = 0; i < 3; i++)
		assert((some[i] = dune_page_alloc()));
	count(&used_more, &unused_less);
	assert(used_more == used + 3 && unused_less == unused - 3);
	for (i = 0; i < 3; i++)
		dune_page_put(some[i]);
	count(&used_more, &unused_less);
	assert(used_more == used && unused_less == unused);
}

int main(void)
{
	char *p = (char *)0x500000000000;
	struct page *first, *second, *third;
	pthread_t threads[THREADS];
	unsigned long i;

	assert(dune_init_and_enter() == 0);
	first = dune_page_alloc();
	second = dune_page_alloc();
	assert(first && second && first != second);
	assert(first->ref == 1 && second->ref == 1);

	/* Addresses and back. */
	assert(dune_page2pa(second) != dune_page2pa(first));
	assert(dune_page2pa(first) % PGSIZE == 0);
	assert(dune_pa2page(dune_page2pa(first)) == first);
	assert(dune_pa2page(dune_page2pa(second) + 123) == second);
	assert(dune_page_isfrompool(dune_page2pa(first)));
	assert(!dune_page_isfrompool(dune_va_to_pa(&first)));
	assert(!dune_page_isfrompool(0));

	/* Users. */
	assert(dune_page_get(first) == first && first->ref == 2);
	dune_page_put(first);
	assert(first->ref == 1);
	assert(dune_vm_insert_page(pgroot, p, first, PERM_R | PERM_W) == 0);
	assert(first->ref == 2 && dune_vm_lookup_page(pgroot, p) == first);
	strcpy(p, "in the pool");
	assert(strcmp((char *)dune_page2pa(first), "in the pool") == 0);
	dune_page_put(first);
	/* The page table is the last user now. */
	assert(first->ref == 1 && strcmp(p, "in the pool") == 0);
	dune_vm_unmap(pgroot, p, PGSIZE);
	assert(first->ref == 0 && !dune_vm_lookup_page(pgroot, p));

	/* It comes again, as new. */
	third = dune_page_alloc();
	assert(third == first && third->ref == 1);
	for (i = 0; i < PGSIZE; i++)
		assert(((char *)dune_page2pa(third))[i] == 0);
	dune_page_free(third);
	assert(dune_page_alloc() == first);

	for (i = 0; i < THREADS; i++)
		assert(pthread_create(&threads[i], NULL, take_and_give, (void *)(i + 1)) == 0);
	for (i = 0; i < THREADS; i++)
		assert(pthread_join(threads[i], NULL) == 0);
	test_stats();
	return 0;
}

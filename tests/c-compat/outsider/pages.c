/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The page allocator: reference counts, physical addresses, mapping, a private page list. */
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_pages:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define A 0x460000000000UL
#define N 2000
static struct page *pg[N];
static SLIST_HEAD(mylist, page) mine = SLIST_HEAD_INITIALIZER(mine);

int main(void)
{
	ptent_t *pte;
	struct page *p, *q;
	physaddr_t pa;
	int i, j, n;
	char *m;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	for (i = 0; i < N; i++) {
		pg[i] = dune_page_alloc();
		CHECK(pg[i] != NULL);
		CHECK(pg[i]->ref == 1);
		pa = dune_page2pa(pg[i]);
		CHECK(!(pa & (PGSIZE - 1)));
		CHECK(dune_pa2page(pa) == pg[i]);
		CHECK(dune_pa2page(pa + 123) == pg[i]);
		CHECK(dune_page_isfrompool(pa));
	}
	m = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(!dune_page_isfrompool(dune_va_to_pa(m)));
	CHECK(!dune_page_isfrompool(dune_va_to_pa(pg)));

	/* each page mapped: distinct memory; through map_phys and insert_page the same page */
	for (i = 0; i < N; i++)
		CHECK(dune_vm_insert_page(pgroot, (void *)(A + i * PGSIZE), pg[i], PERM_R | PERM_W) == 0);
	for (i = 0; i < N; i++)
		memset((void *)(A + i * PGSIZE), i, PGSIZE);
	for (i = 0; i < N; i += 97)
		for (j = 0; j < PGSIZE; j += 511)
			CHECK(((unsigned char *)A)[i * PGSIZE + j] == (i & 255));
	for (i = 0; i < N; i += 50) {
		CHECK(dune_vm_lookup(pgroot, (void *)(A + i * PGSIZE), CREATE_NONE, &pte) == 0);
		CHECK(PTE_ADDR(*pte) == dune_page2pa(pg[i]));
		CHECK(dune_vm_lookup_page(pgroot, (void *)(A + i * PGSIZE)) == pg[i]);
		CHECK(dune_vm_map_phys(pgroot, (void *)(A + 0x40000000 + i * PGSIZE), PGSIZE,
				       (void *)dune_page2pa(pg[i]), PERM_R | PERM_W) == 0);
		((volatile char *)A)[0x40000000 + i * PGSIZE + 77] = 0x5a;
		CHECK(((volatile char *)A)[i * PGSIZE + 77] == 0x5a);
	}
	CHECK(dune_vm_lookup_page(pgroot, (void *)0x4f0000000000) == NULL);

	/* counts: what get adds, put takes away */
	p = dune_page_alloc();
	CHECK(p->ref == 1);
	CHECK(dune_page_get(p) == p && p->ref == 2);
	dune_page_get(p);
	CHECK(p->ref == 3);
	dune_page_put(p);
	dune_page_put(p);
	CHECK(p->ref == 1);
	q = dune_page_alloc();
	CHECK(q != p);
	dune_page_put(p);
	dune_page_put(q);

	/* alloc and free for ever does not run dry */
	for (i = 0; i < 30000; i++) {
		p = dune_page_alloc();
		if (!p) {
			CHECK(!"ran dry");
			break;
		}
		if (i & 1)
			dune_page_free(p);
		else
			dune_page_put(p);
	}
	/* map_pages and unmap for ever neither: unmap gives the pages back */
	for (i = 0; i < 60; i++) {
		if (dune_vm_map_pages(pgroot, (void *)(A + 0x80000000UL), 512 * PGSIZE, PERM_R | PERM_W)) {
			printf("round %d\n", i);
			CHECK(!"map_pages ran dry");
			break;
		}
		((volatile char *)A)[0x80000000UL + (i & 511) * PGSIZE] = 1;
		dune_vm_unmap(pgroot, (void *)(A + 0x80000000UL), 512 * PGSIZE);
	}
	/* a page that a program holds can be on a list of its own, through its link */
	for (i = 0; i < 10; i++) {
		p = dune_page_alloc();
		SLIST_INSERT_HEAD(&mine, p, link);
	}
	n = 0;
	SLIST_FOREACH(p, &mine, link)
		n += p->ref == 1;
	CHECK(n == 10);
	while (!SLIST_EMPTY(&mine)) {
		p = SLIST_FIRST(&mine);
		SLIST_REMOVE_HEAD(&mine, link);
		dune_page_free(p);
	}
	for (i = 0; i < N; i += 97)
		CHECK(((unsigned char *)A)[i * PGSIZE + 5] == (i & 255));
	dune_page_stats();
	if (!bad)
		printf("ok ci_pages\n");
	return bad;
}

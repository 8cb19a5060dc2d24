/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A small mark-and-sweep whose second mark starts from the pages that the PTE dirty bits name. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_gc:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define PAGES 256
#define PER (PGSIZE / sizeof(struct cell))
#define CELLS ((int)(PAGES * PER))
struct cell { struct cell *l, *r; long val, used; };
static struct cell *heap, *freelist, *roots[16];
static unsigned char mark[PAGES * PGSIZE / sizeof(struct cell)], oracle[sizeof mark], dirty[PAGES], touched[PAGES];
static unsigned seed = 12345;
static unsigned rnd(void) { return (seed = seed * 1103515245 + 12345) >> 8; }
static void mark_from(struct cell *c, unsigned char *m)
{
	while (c && !m[c - heap]) {
		m[c - heap] = 1;
		mark_from(c->l, m);
		c = c->r;
	}
}
static int clear_cb(const void *arg, ptent_t *pte, void *va) { *pte &= ~(ptent_t)PTE_D; ++*(int *)arg; return 0; }
static int dirty_cb(const void *arg, ptent_t *pte, void *va)
{
	if (*pte & PTE_D) {
		dirty[((char *)va - (char *)heap) >> PGSHIFT] = 1;
		++*(int *)arg;
	}
	return 0;
}
static void set(struct cell *c, struct cell **f, struct cell *v)
{
	touched[((char *)c - (char *)heap) >> PGSHIFT] = 1;
	*(struct cell *volatile *)f = v;
}
static struct cell *pick(void)		/* a random live cell */
{
	struct cell *c = roots[rnd() % 16];
	int n = rnd() % 12;
	while (c && n--) {
		struct cell *d = rnd() & 1 ? c->l : c->r;
		if (!d)
			break;
		c = d;
	}
	return c;
}
static struct cell *alloc(struct cell *l, struct cell *r)
{
	struct cell *c = freelist;
	if (!c)
		return NULL;
	freelist = c->l;
	set(c, &c->l, l);
	set(c, &c->r, r);
	c->used = 1;
	return c;
}
static int sweep(void)
{
	int i, n = 0;
	freelist = NULL;
	for (i = CELLS - 1; i >= 0; i--)
		if (!mark[i]) {
			heap[i].used = 0;
			heap[i].l = freelist;
			heap[i].r = NULL;
			freelist = &heap[i];
			n++;
		}
	return n;
}

static void round_(int k)
{
	int i, j, n = 0, want = 0, live = 0;
	struct cell *c;

	/* old generation: mark, sweep, forget the dirty bits */
	memset(mark, 0, sizeof mark);
	for (i = 0; i < 16; i++)
		mark_from(roots[i], mark);
	sweep();
	n = 0;
	CHECK(dune_vm_page_walk(pgroot, heap, (char *)heap + PAGES * PGSIZE - 1, clear_cb, &n) == 0);
	CHECK(n == PAGES);
	dune_flush_tlb();
	memset(touched, 0, sizeof touched);
	memset(dirty, 0, sizeof dirty);

	/* the mutator */
	for (i = 0; i < 40 + 10 * k; i++) {
		struct cell *a = pick(), *b = pick(), *to = pick();
		c = alloc(a, b);
		if (c && to)
			set(to, rnd() & 1 ? &to->l : &to->r, c);
		else if (c)
			roots[rnd() % 16] = c;
	}
	for (i = 0; i < CELLS; i++)	/* reading must not make anything dirty */
		live += heap[i].used;

	n = 0;
	CHECK(dune_vm_page_walk(pgroot, heap, (char *)heap + PAGES * PGSIZE - 1, dirty_cb, &n) == 0);
	for (i = 0; i < PAGES; i++) {
		want += touched[i];
		CHECK(dirty[i] == touched[i]);
	}
	CHECK(n == want && n > 0 && n < PAGES);

	/* sticky mark bits: marked cells on dirty pages and the roots */
	for (i = 0; i < PAGES; i++)
		for (j = 0; dirty[i] && j < (int)PER; j++) {
			c = &heap[i * PER + j];
			if (mark[c - heap]) {
				mark_from(c->l, mark);
				mark_from(c->r, mark);
			}
		}
	for (i = 0; i < 16; i++)
		mark_from(roots[i], mark);
	memset(oracle, 0, sizeof oracle);
	for (i = 0; i < 16; i++)
		mark_from(roots[i], oracle);
	for (i = 0; i < CELLS; i++)
		CHECK(mark[i] >= oracle[i]);	/* never frees a live cell */
	n = sweep();
	CHECK(n > 0 && n < CELLS && live > 0);
}

int main(void)
{
	int k;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	for (k = 0; k < 2; k++) {	/* a heap of pool pages; a heap of mmap that mprotect split */
		if (k == 0) {
			heap = (struct cell *)0x470000000000;
			CHECK(dune_vm_map_pages(pgroot, heap, PAGES * PGSIZE, PERM_R | PERM_W) == 0);
		} else {
			heap = mmap(NULL, PAGES * PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			CHECK(dune_vm_mprotect(pgroot, heap, PAGES * PGSIZE, PERM_R | PERM_W) == 0);
		}
		memset(heap, 0, PAGES * PGSIZE);
		memset(mark, 0, sizeof mark);
		memset(roots, 0, sizeof roots);
		sweep();
		for (int i = 0; i < 16; i++)
			roots[i] = alloc(NULL, NULL);
		for (int i = 0; i < 12; i++)
			round_(i);
	}
	if (!bad)
		printf("ok ci_gc\n");
	return bad;
}

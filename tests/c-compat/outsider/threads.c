/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* pthreads: dune_enter in each, traps and page faults in each, thread-local data, a mutex. */
#include <stdio.h>
#include <stdlib.h>
#include <pthread.h>
#include <unistd.h>
#include <errno.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_threads:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define T 6
#define ROUNDS 200
#define A 0x450000000000UL
static __thread volatile int mine, myflt;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cv = PTHREAD_COND_INITIALIZER;
static int total, arrived;
static volatile int foreign;

static void on_bp(struct dune_tf *tf)
{
	mine++;
	if (tf->rdi != (uint64_t)&mine)		/* the handler runs on the thread that trapped */
		foreign++;
}
static void on_pf(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;
	myflt++;
	if (addr < A || addr >= A + T * PGSIZE || dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte)) {
		dune_printf("fault at %lx, rip %lx\n", addr, tf->rip);
		dune_die();
	}
	*pte |= PTE_P | PTE_W;
	dune_flush_tlb_one(addr);
}

static void *thread(void *arg)
{
	long k = (long)arg;
	volatile char *pg = (char *)A + k * PGSIZE;
	ptent_t *pte;
	int i;

	CHECK(dune_enter() == 0);
	pthread_mutex_lock(&mu);
	if (++arrived == T)
		pthread_cond_broadcast(&cv);
	while (arrived < T)
		pthread_cond_wait(&cv, &mu);
	pthread_mutex_unlock(&mu);
	for (i = 0; i < ROUNDS; i++) {
		asm volatile("int3" : : "D"(&mine) : "memory");
		CHECK(dune_vm_lookup(pgroot, (void *)pg, CREATE_NONE, &pte) == 0);
		*pte &= ~(ptent_t)PTE_W;
		dune_flush_tlb_one((unsigned long)pg);
		pg[8] = i;
		errno = 0;
		CHECK(close(-1) == -1 && errno == EBADF);
		free(malloc(100 + i * 50));
		pthread_mutex_lock(&mu);
		total++;
		pthread_mutex_unlock(&mu);
	}
	CHECK(mine == ROUNDS);
	CHECK(myflt == ROUNDS);
	return (void *)(k * 3);
}

int main(void)
{
	pthread_t t[T];
	void *r;
	long i;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	CHECK(dune_register_intr_handler(T_BRKPT, on_bp) == 0);
	dune_register_pgflt_handler(on_pf);
	CHECK(dune_vm_map_pages(pgroot, (void *)A, T * PGSIZE, PERM_R | PERM_W) == 0);
	for (i = 0; i < T; i++)
		CHECK(pthread_create(&t[i], NULL, thread, (void *)i) == 0);
	for (i = 0; i < T; i++)
		CHECK(pthread_join(t[i], &r) == 0 && r == (void *)(i * 3));
	CHECK(total == T * ROUNDS && foreign == 0 && mine == 0 && myflt == 0);
	asm volatile("int3" : : "D"(&mine) : "memory");
	CHECK(mine == 1);
	if (!bad)
		printf("ok ci_threads\n");
	return bad;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Children and threads: in Dune mode by themselves, where dune_enter does no harm; others can enter.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

#define MAP_ADDR 0x400000000000

static __thread int breakpoints;
static int shared_breakpoints;
static pthread_barrier_t barrier;

static int is_inside(void)
{
	unsigned short cs;

	__asm__ volatile("mov %%cs, %0" : "=r"(cs));
	return (cs & 3) == 0;
}

static void on_breakpoint(struct dune_tf *tf)
{
	(void)tf;
	breakpoints++;
	__atomic_add_fetch(&shared_breakpoints, 1, __ATOMIC_SEQ_CST);
}

static void on_pgflt(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;

	(void)fec;
	(void)tf;
	assert(dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte) == 0);
	*pte |= PTE_W;
}

static void *inside_from_the_start(void *arg)
{
	char *own = malloc(100000);

	assert(is_inside());
	assert(dune_enter() == 0);
	__asm__ volatile("int3");
	assert(breakpoints == 1);
	assert(own && memset(own, 3, 100000) && own[99999] == 3);
	free(own);
	/* The page table is everyone's. */
	((char *)MAP_ADDR)[(long)arg] = (long)arg;
	return arg;
}

static void *enters_by_itself(void *arg)
{
	/* Made before the process entered Dune mode. */
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	assert(!is_inside());
	assert(dune_enter() == 0);
	assert(is_inside());
	__asm__ volatile("int3");
	assert(breakpoints == 1);
	return arg;
}

static int status_of(pid_t pid)
{
	int status;

	assert(waitpid(pid, &status, 0) == pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* A child of a process that has called dune_init, but has not entered. */
static void test_child_between_init_and_enter(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		assert(!is_inside());
		assert(dune_enter() == 0);
		assert(is_inside());
		assert(dune_vm_map_pages(pgroot, (void *)MAP_ADDR, PGSIZE, PERM_R | PERM_W) == 0);
		*(char *)MAP_ADDR = 1;
		_exit(11);
	}
	assert(status_of(pid) == 11);
}

static void test_children(void)
{
	char *p = (char *)MAP_ADDR;
	int value = 1;
	pid_t pid;

	strcpy(p, "parent");
	pid = fork();
	if (pid == 0) {
		assert(is_inside());
		assert(dune_enter() == 0);
		value = 2;
		assert(strcmp(p, "parent") == 0);
		strcpy(p, "child");
		/* Handlers are kept; the page table is the child's own. */
		__asm__ volatile("int3");
		assert(shared_breakpoints == 1);
		assert(dune_vm_mprotect(pgroot, p, PGSIZE, PERM_R) == 0);
		strcpy(p, "grown");
		pid = fork();
		if (pid == 0)
			_exit(is_inside() && strcmp(p, "grown") == 0 ? 5 : 6);
		_exit(value + status_of(pid));
	}
	assert(status_of(pid) == 7);
	assert(value == 1 && strcmp(p, "parent") == 0 && shared_breakpoints == 0);
	/* A program that it executes starts outside. */
	assert(system("exit 3") == 3 << 8);
	assert(is_inside());
}

static void test_threads(pthread_t early)
{
	pthread_t threads[8];
	void *result;
	long i;

	for (i = 0; i < 8; i++)
		assert(pthread_create(&threads[i], NULL, inside_from_the_start, (void *)i) == 0);
	for (i = 0; i < 8; i++)
		assert(pthread_join(threads[i], &result) == 0 && result == (void *)i);
	for (i = 0; i < 8; i++)
		assert(((char *)MAP_ADDR)[i] == i);
	assert(breakpoints == 0 && shared_breakpoints == 8);
	pthread_barrier_wait(&barrier);
	assert(pthread_join(early, NULL) == 0);
	assert(shared_breakpoints == 9);
}

int main(void)
{
	pthread_t early;

	assert(pthread_barrier_init(&barrier, NULL, 2) == 0);
	assert(dune_enter() < 0);
	assert(dune_init(true) == 0);
	test_child_between_init_and_enter();
	assert(pthread_create(&early, NULL, enters_by_itself, NULL) == 0);
	pthread_barrier_wait(&barrier);
	assert(dune_enter() == 0);
	assert(dune_enter() == 0);
	assert(dune_init(true) == 0);
	assert(dune_register_intr_handler(T_BRKPT, on_breakpoint) == 0);
	dune_register_pgflt_handler(on_pgflt);
	assert(dune_vm_map_pages(pgroot, (void *)MAP_ADDR, PGSIZE, PERM_R | PERM_W) == 0);
	test_children();
	test_threads(early);
	puts("all children and threads came back");
	return 0;
}

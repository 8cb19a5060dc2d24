/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How a program ends: by itself, by dune_die, by a failed assert, by what nobody handles.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libdune/dune.h"

static volatile long *words;
static int leaves_it_alone;

/* The program's own, in place of the library's. */
void on_dune_exit(struct dune_config *config)
{
	words[0] = config->ret;
	words[1] = config->rip;
	words[2]++;
}

static void on_pgflt(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	(void)addr;
	(void)fec;
	(void)tf;
	leaves_it_alone++;
}

static void dies(void)
{
	dune_die();
}

static void fails(void)
{
	assert(words == NULL);
}

static void exits(void)
{
	exit(9);
}

static void touches_nothing(void)
{
	/* Linux' signal, in spite of a handler that thinks it has mended it. */
	dune_register_pgflt_handler(on_pgflt);
	*(volatile char *)16 = 1;
}

static void faults(void)
{
	char *p = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	dune_vm_mprotect(pgroot, p, PGSIZE, PERM_NONE);
	*(volatile char *)p = 1;
}

static int run(void (*f)(void))
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		f();
		_exit(77);
	}
	assert(waitpid(pid, &status, 0) == pid);
	return status;
}

int main(void)
{
	int status;

	words = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert(words != MAP_FAILED);
	assert(dune_init_and_enter() == 0);
	status = run(dies);
	/* Not by assert, which ends by dune_die. */
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 1)
		return 2;
	status = run(fails);
	assert(WIFEXITED(status) && WEXITSTATUS(status) == 1);
	status = run(exits);
	assert(WIFEXITED(status) && WEXITSTATUS(status) == 9);
	status = run(touches_nothing);
	assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	assert(words[2] == 0);
	status = run(faults);
	assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	assert(words[2] == 1 && words[0] == DUNE_RET_INTERRUPT && words[1] != 0);
	return 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * PERM_X: a page is executable where the page table and Linux have it so. For the first Dune the page table was enough.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libdune/dune.h"

#define STACK 65536
#define SYS_DONE 1000
#define PERM_ALL (PERM_R | PERM_W | PERM_X | PERM_U)

/* mov $42, %eax; ret */
static const unsigned char returns[] = { 0xb8, 42, 0, 0, 0, 0xc3 };
/* mov $42, %edi; mov $SYS_DONE, %eax; syscall */
static const unsigned char calls[] = { 0xbf, 42, 0, 0, 0, 0xb8, 0xe8, 3, 0, 0, 0x0f, 0x05 };

static char *stack;
static volatile int *faults;
static void *code;
static uint64_t last_fec;
static uintptr_t last_addr;

/* Does what was enough for the first Dune. */
static void edits_entry(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;

	(void)tf;
	(*faults)++;
	last_fec = fec;
	last_addr = addr;
	if (dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte) != 0)
		dune_die();
	*pte = (*pte & ~PTE_NX) | PTE_P | PTE_U;
	dune_flush_tlb_one(addr);
}

/* Tells Linux. */
static void asks_linux(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	edits_entry(addr, fec, tf);
	if (mprotect(code, PGSIZE, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
		dune_die();
}

static void gives_up(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	edits_entry(addr, fec, tf);
	dune_ret_from_user(-5);
}

static void on_syscall(struct dune_tf *tf)
{
	if (tf->rax != SYS_DONE)
		dune_die();
	dune_ret_from_user(ARG0(tf));
}

static int at_cpl0(void)
{
	memcpy(code, returns, sizeof(returns));
	return ((int (*)(void))code)();
}

static int at_cpl3(void)
{
	struct dune_tf tf = { 0 };

	memcpy(code, calls, sizeof(calls));
	tf.rip = (unsigned long)code;
	tf.rsp = (unsigned long)stack + STACK - 8;
	tf.rflags = 2;
	return dune_jump_to_user(&tf);
}

/* In a child, whose memory nobody has mended. */
static int run(int (*f)(void), dune_pgflt_cb handler)
{
	int status;
	pid_t pid = fork();

	*faults = 0;
	if (pid == 0) {
		dune_register_pgflt_handler(handler);
		_exit(f() == 42 ? 33 : 34);
	}
	assert(waitpid(pid, &status, 0) == pid);
	return status;
}

int main(void)
{
	int status;

	code = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	faults = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert(code != MAP_FAILED && stack != MAP_FAILED && (void *)faults != MAP_FAILED);
	assert(dune_init_and_enter() == 0);
	dune_register_syscall_handler(on_syscall);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_R | PERM_W | PERM_X) == 0);

	/* Without PROT_EXEC: a handler that knows the page table only is asked 17 times, and then it is Linux' signal. */
	status = run(at_cpl0, edits_entry);
	assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	assert(*faults == 17);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_ALL) == 0);
	/* At CPL3 it is a line on standard error. */
	status = run(at_cpl3, edits_entry);
	assert(WIFEXITED(status) && WEXITSTATUS(status) == 1);
	assert(*faults == 17);

	/* A handler that knows Linux, too, mends it. */
	status = run(at_cpl3, asks_linux);
	assert(WIFEXITED(status) && WEXITSTATUS(status) == 33 && *faults == 1);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_R | PERM_W | PERM_X) == 0);
	status = run(at_cpl0, asks_linux);
	assert(WIFEXITED(status) && WEXITSTATUS(status) == 33 && *faults == 1);

	/* It comes with the error code of a fetch that the page table forbids. */
	dune_register_pgflt_handler(gives_up);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_ALL) == 0);
	assert(at_cpl3() == -5);
	assert(last_addr == (uintptr_t)code && last_fec == (FEC_P | FEC_U | FEC_I));

	/* Memory with PROT_EXEC, and pages of the pool, go by the page table. */
	assert(mprotect(code, PGSIZE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
	assert(at_cpl3() == 42);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_R | PERM_W | PERM_U) == 0);
	assert(at_cpl3() == -5);
	assert(last_fec == (FEC_P | FEC_U | FEC_I));
	code = (void *)0x500000000000;
	assert(dune_vm_map_pages(pgroot, code, PGSIZE, PERM_ALL) == 0);
	assert(at_cpl3() == 42);
	assert(dune_vm_mprotect(pgroot, code, PGSIZE, PERM_R | PERM_W | PERM_X) == 0);
	assert(at_cpl0() == 42);
	return 0;
}

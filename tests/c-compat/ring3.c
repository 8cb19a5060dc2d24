/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Code at CPL3: its system calls and exceptions come to handlers at CPL0, which answer or pass them on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

#define STACK 65536
#define MAP_ADDR 0x400000000000
#define SYS_DONE 1000
#define SYS_SIX 1001
#define SYS_REDIRECT 1002
#define SYS_NEST 1003

static char *stack;
static int calls, faults, breakpoints;
static struct dune_tf last;

static unsigned short code_segment(void)
{
	unsigned short cs;

	__asm__ volatile("mov %%cs, %0" : "=r"(cs));
	return cs;
}

static long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static void done(long result)
{
	call(SYS_DONE, result, 0, 0, 0, 0, 0);
}

static int run(void (*f)(long), long argument)
{
	struct dune_tf *tf = malloc(sizeof(*tf));
	int ret;

	assert(tf);
	/* Selectors and all else are what malloc left. */
	tf->rip = (unsigned long)f;
	tf->rdi = argument;
	tf->rsp = (unsigned long)stack + STACK - 8;
	tf->rflags = 0x02;
	ret = dune_jump_to_user(tf);
	assert((code_segment() & 3) == 0);
	free(tf);
	return ret;
}

static void redirected(void)
{
	done(1234);
}

static void innermost(long argument)
{
	done(argument + 1);
}

static void on_syscall(struct dune_tf *tf)
{
	struct dune_tf inner = { 0 };

	calls++;
	last = *tf;
	assert((code_segment() & 3) == 0);
	switch (tf->rax) {
	case SYS_DONE:
		dune_ret_from_user(ARG0(tf));
	case SYS_SIX:
		tf->rax = ARG0(tf) * 100000 + ARG1(tf) * 10000 + ARG2(tf) * 1000 + ARG3(tf) * 100 +
			  ARG4(tf) * 10 + ARG5(tf);
		return;
	case SYS_REDIRECT:
		tf->rip = (unsigned long)redirected;
		return;
	case SYS_NEST:
		inner.rip = (unsigned long)innermost;
		inner.rdi = ARG0(tf);
		/* Below what the outer code uses of its stack. */
		inner.rsp = tf->rsp - 4096;
		tf->rax = dune_jump_to_user(&inner);
		return;
	case SYS_unlink:
		tf->rax = -EPERM;
		return;
	default:
		dune_passthrough_syscall(tf);
	}
}

static void on_pgflt(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	ptent_t *pte;

	faults++;
	assert(fec & FEC_U);
	assert((tf->cs & 3) == 3);
	assert(dune_vm_lookup(pgroot, (void *)addr, CREATE_NONE, &pte) == 0);
	*pte |= PTE_P | PTE_W | PTE_U | PTE_A | PTE_D;
}

static void on_breakpoint(struct dune_tf *tf)
{
	breakpoints++;
	last = *tf;
	tf->rax = 99;
}

static void user_returns(long argument)
{
	done((code_segment() & 3) == 3 ? argument : -1);
}

static void user_calls(long pid)
{
	long result = 0;

	/* libc works at CPL3, through the handler. */
	result |= (getpid() == pid) << 0;
	result |= (syscall(SYS_getpid) == pid) << 1;
	result |= (call(SYS_SIX, 1, 2, 3, 4, 5, 6) == 123456) << 2;
	result |= (unlink("/nowhere") == -1 && errno == EPERM) << 3;
	result |= (write(-1, "", 1) == -1 && errno == EBADF) << 4;
	result |= (printf("a line from CPL3\n") == 17) << 5;
	result |= (fflush(stdout) == 0) << 6;
	done(result);
}

static void user_faults(long address)
{
	*(volatile char *)address = 5;
	done(*(volatile char *)address);
}

static void user_breaks(long unused)
{
	long result = 0;

	(void)unused;
	__asm__ volatile("int3" : "+a"(result));
	done(result);
}

static void user_is_redirected(long unused)
{
	(void)unused;
	call(SYS_REDIRECT, 0, 0, 0, 0, 0, 0);
	done(-1);
}

static void user_nests(long argument)
{
	done(call(SYS_NEST, argument, 0, 0, 0, 0, 0) * 2);
}

static void user_reads_fs(long unused)
{
	long value;

	(void)unused;
	__asm__ volatile("mov %%fs:8, %0" : "=r"(value));
	done(value);
}

static void user_forks(long unused)
{
	int status = -1;
	pid_t pid;

	(void)unused;
	pid = call(SYS_fork, 0, 0, 0, 0, 0, 0);
	if (pid == 0)
		call(SYS_exit_group, (code_segment() & 3) == 3 ? 33 : 34, 0, 0, 0, 0, 0);
	call(SYS_wait4, pid, (long)&status, 0, 0, 0, 0);
	done(status);
}

static void user_reads(long address)
{
	done(*(volatile int *)address);
}

static void test_segments(void)
{
	unsigned long own = dune_get_user_fs(), block[2] = { 0, 4242 };

	assert(own != 0);
	dune_set_user_fs((unsigned long)block);
	assert(dune_get_user_fs() == (unsigned long)block);
	assert(run(user_reads_fs, 0) == 4242);
	dune_set_user_fs(own);
	/* CPL0 has its own all along. */
	errno = 17;
	assert(errno == 17);
}

static jmp_buf before;
static long landed;

static void landing(long argument)
{
	landed = argument;
	longjmp(before, 1);
}

static void test_trap_frames(void)
{
	struct dune_tf tf = { 0 };
	int status;
	pid_t pid = fork();

	tf.rsp = (unsigned long)stack + STACK - 8;
	tf.rdi = 55;
	/* To CPL3, for good: the child ends there. */
	if (pid == 0) {
		tf.rip = (unsigned long)_exit;
		tf.cs = GD_UT | 3;
		tf.ss = GD_UD | 3;
		dune_pop_trap_frame(&tf);
	}
	assert(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 55);
	/* To CPL0, on another stack. */
	if (setjmp(before) == 0) {
		tf.rip = (unsigned long)landing;
		tf.cs = GD_KT;
		tf.ss = GD_KD;
		dune_pop_trap_frame(&tf);
	}
	assert(landed == 55 && (code_segment() & 3) == 0);
	/* System calls work there as before. */
	assert(getppid() > 0);
}

static void test_only_what_is_given(void)
{
	int *secret = mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert(secret != MAP_FAILED);
	*secret = 31;
	faults = 0;
	/* The program takes it away from CPL3: the handler hears of it. */
	assert(dune_vm_mprotect(pgroot, secret, PGSIZE, PERM_R | PERM_W) == 0);
	assert(run(user_reads, (long)secret) == 31 && faults == 1);
	assert(dune_vm_mprotect(pgroot, secret, PGSIZE, PERM_USTACK) == 0);
	assert(run(user_reads, (long)secret) == 31 && faults == 1);
}

static void *visits(void *arg)
{
	char *own = malloc(STACK);
	struct dune_tf tf = { 0 };
	long i;

	assert(own);
	for (i = 0; i < 50; i++) {
		tf.rip = (unsigned long)user_nests;
		tf.rdi = (long)arg * 1000 + i;
		tf.rsp = ((unsigned long)own + STACK - 16) & ~15UL;
		tf.rsp -= 8;
		assert(dune_jump_to_user(&tf) == 2 * ((long)arg * 1000 + i + 1));
	}
	free(own);
	return arg;
}

/* Each thread has visits of its own. */
static void test_threads(void)
{
	pthread_t threads[4];
	long i;

	for (i = 0; i < 4; i++)
		assert(pthread_create(&threads[i], NULL, visits, (void *)i) == 0);
	for (i = 0; i < 4; i++)
		assert(pthread_join(threads[i], NULL) == 0);
}

static uintptr_t denied_addr;
static uint64_t denied_fec;

static void deny(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	assert((tf->cs & 3) == 3);
	denied_addr = addr;
	denied_fec = fec;
	dune_ret_from_user(-5);
}

/* Without map_full CPL3 has only what it is given. */
static void sandbox(void)
{
	/* mov (%rdi), %eax; mov %eax, %edi; mov $SYS_DONE, %eax; syscall */
	static const unsigned char code[] = { 0x8b, 0x07, 0x89, 0xc7, 0xb8, 0xe8, 0x03, 0, 0, 0x0f, 0x05 };
	int prot = PROT_READ | PROT_WRITE | PROT_EXEC;
	char *text = mmap(NULL, PGSIZE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int *secret = mmap(NULL, 2 * PGSIZE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *given = secret + PGSIZE / 4;
	void (*f)(long) = (void (*)(long))text;

	assert(text != MAP_FAILED && (void *)secret != MAP_FAILED);
	memcpy(text, code, sizeof(code));
	*secret = 41;
	*given = 42;
	assert(dune_init(false) == 0 && dune_enter() == 0);
	dune_register_syscall_handler(on_syscall);
	dune_register_pgflt_handler(deny);
	assert(run(f, (long)given) == -5);
	assert(denied_addr == (uintptr_t)text && denied_fec == (FEC_P | FEC_U | FEC_I));
	assert(dune_vm_mprotect(pgroot, text, PGSIZE, PERM_UCODE) == 0);
	assert(run(f, (long)given) == -5);
	assert(denied_addr == (uintptr_t)given && denied_fec == (FEC_P | FEC_U));
	assert(dune_vm_mprotect(pgroot, given, PGSIZE, PERM_R | PERM_U) == 0);
	assert(run(f, (long)given) == 42);
	assert(run(f, (long)secret) == -5 && denied_addr == (uintptr_t)secret);
	/* Neither the program's own memory, nor libdune's, nor the pool. */
	assert(run(f, (long)&stack) == -5 && denied_addr == (uintptr_t)&stack);
	assert(run(f, (long)pgroot) == -5 && denied_addr == (uintptr_t)pgroot);
	assert(run(f, dune_page2pa(pages)) == -5);
}

int main(void)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		stack = aligned_alloc(PGSIZE, STACK);
		sandbox();
		_exit(12);
	}
	assert(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 12);
	stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(stack != MAP_FAILED);
	assert(dune_init_and_enter() == 0);
	dune_register_syscall_handler(on_syscall);
	dune_register_pgflt_handler(on_pgflt);
	assert(dune_register_intr_handler(T_BRKPT, on_breakpoint) == 0);

	assert(run(user_returns, 7) == 7);
	assert(run(user_returns, -7) == -7);
	calls = 0;
	assert(run(user_calls, getpid()) == 0x7f);
	assert(calls >= 7 && last.rax == SYS_DONE);
	assert(dune_vm_map_pages(pgroot, (void *)MAP_ADDR, 1, PERM_R) == 0);
	faults = 0;
	assert(run(user_faults, MAP_ADDR) == 5 && faults == 1);
	assert(run(user_breaks, 0) == 99 && breakpoints == 1);
	assert(last.cs == (GD_UT | 3) && last.ss == (GD_UD | 3));
	assert(run(user_is_redirected, 0) == 1234);
	/* All of the program, but not what libdune keeps. */
	assert(run(user_reads, (long)&breakpoints) == 1);
	dune_register_pgflt_handler(deny);
	assert(run(user_reads, (long)pgroot) == -5 && denied_addr == (uintptr_t)pgroot);
	assert(run(user_reads, dune_page2pa(pages)) == -5);
	dune_register_pgflt_handler(on_pgflt);
	assert(run(user_nests, 20) == 42);
	assert(WEXITSTATUS(run(user_forks, 0)) == 33);
	test_segments();
	test_threads();
	test_only_what_is_given();
	test_trap_frames();
	assert(run(user_returns, 8) == 8);
	return 0;
}

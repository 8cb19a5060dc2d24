/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Ring 3 with a system-call handler that answers some calls and passes others on. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_user:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
extern char __executable_start[], etext[], __data_start[], end[];
#define STACK (64 * 1024)

static volatile int ncalls, user_cs, npassed;
static volatile long saved[8];
static long page[2];
static int fd;

static inline long sc6(long n, long a, long b, long c, long d, long e, long f)
{
	long r;
	register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
	asm volatile("syscall" : "=a"(r) : "0"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return r;
}

static void user_main(long a, long b)
{
	unsigned short cs;
	static char buf[8];

	asm volatile("mov %%cs, %0" : "=r"(cs));
	user_cs = cs;
	saved[0] = a * 1000 + b;
	saved[1] = sc6(SYS_getpid, 0, 0, 0, 0, 0, 0);		/* answered by us */
	saved[2] = sc6(SYS_getppid, 0, 0, 0, 0, 0, 0);		/* passed on */
	saved[3] = sc6(SYS_pwrite64, fd, (long)"hello", 5, 100, 0, 0);
	saved[4] = sc6(SYS_pread64, fd, (long)buf, 5, 100, 0, 0);
	saved[5] = buf[0] == 'h' && buf[4] == 'o';
	saved[6] = sc6(5000, 1, 2, 3, 4, 5, 6);			/* a call of our own */
	saved[7] = sc6(SYS_close, 12345, 0, 0, 0, 0, 0);	/* -EBADF from the kernel */
	sc6(SYS_exit, 42, 0, 0, 0, 0, 0);
	for (;;)
		;
}

static void handler(struct dune_tf *tf)
{
	ncalls++;
	switch (tf->rax) {
	case SYS_getpid: tf->rax = 123456; break;
	case 5000:
		tf->rax = ARG0(tf) + 10 * ARG1(tf) + 100 * ARG2(tf) + 1000 * ARG3(tf) + 10000 * ARG4(tf)
			+ 100000 * ARG5(tf);
		break;
	case SYS_exit: dune_ret_from_user((int)ARG0(tf));
	default: npassed++; dune_passthrough_syscall(tf);
	}
}

int main(void)
{
	struct dune_tf *tf = malloc(sizeof(*tf));
	char *stk, name[] = "/tmp/ci_userXXXXXX";
	unsigned long t0 = (unsigned long)__executable_start, t1 = (unsigned long)etext;
	unsigned long d0 = (unsigned long)__data_start & ~(PGSIZE - 1UL), d1 = (unsigned long)end;
	long pp = getppid();
	int i;

	fd = mkstemp(name);
	CHECK(fd >= 0);
	unlink(name);
	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	stk = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(stk, 0, STACK);
	/* The whole program may be used at ring 3, and still is used at ring 0. */
	t1 = (t1 + PGSIZE - 1) & ~(PGSIZE - 1UL);
	d1 = (d1 + PGSIZE - 1) & ~(PGSIZE - 1UL);
	CHECK(dune_vm_mprotect(pgroot, (void *)t0, t1 - t0, PERM_UCODE) == 0);
	CHECK(dune_vm_mprotect(pgroot, (void *)t1, d0 - t1, PERM_R | PERM_W | PERM_U) == 0);
	CHECK(dune_vm_mprotect(pgroot, (void *)d0, d1 - d0, PERM_UTEXT) == 0);
	CHECK(dune_vm_mprotect(pgroot, stk, STACK, PERM_USTACK) == 0);
	dune_register_syscall_handler(handler);

	for (i = 0; i < 20; i++) {
		memset((void *)saved, 0xff, sizeof(saved));
		memset(tf, 0, sizeof(*tf));
		tf->rip = (uint64_t)user_main;
		tf->rsp = (uint64_t)stk + STACK - 64 - 8;
		tf->rflags = 0x202;
		tf->cs = GD_UT | 3;
		tf->ss = GD_UD | 3;
		tf->rdi = 5 + i;
		tf->rsi = 6;
		CHECK(dune_jump_to_user(tf) == 42);
		CHECK((user_cs & 3) == 3);
		CHECK(saved[0] == (5 + i) * 1000 + 6);
		CHECK(saved[1] == 123456);
		CHECK(saved[2] == pp);
		CHECK(saved[3] == 5 && saved[4] == 5 && saved[5] == 1);
		CHECK(saved[6] == 654321);
		CHECK(saved[7] == -9);
	}
	CHECK(ncalls == 20 * 7 && npassed == 20 * 4);
	CHECK(getpid() != 123456);
	page[0] = 1;
	if (!bad)
		printf("ok ci_user\n");
	return bad;
}

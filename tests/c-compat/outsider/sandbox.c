/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A sandbox: a function runs at CPL3, sees its own pages only, may make two system calls. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_sandbox:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
#define BOX 0x480000000000UL	/* code, data, stack */
#define UFN __attribute__((section("boxtext"), noinline, used, aligned(16)))
extern char __start_boxtext[], __stop_boxtext[];
static char secret[PGSIZE] __attribute__((aligned(PGSIZE))) = "secret";
static volatile int nflt, nsys, nref, ngp, nbp, nde;
static volatile uintptr_t flt;
static volatile uint64_t fltfec;
static volatile unsigned long fsseen;
enum { VIOLATION = -100, PRIV = -101, DIVZERO = -102 };

static inline __attribute__((always_inline)) long sc(long n, long a, long b, long c)
{
	long r;
	asm volatile("syscall" : "=a"(r) : "0"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return r;
}
UFN static void u_good(volatile long *d, long n)
{
	long i, s = 0;
	volatile long onstk[600];
	for (i = 0; i < 600; i++)
		onstk[i] = i;
	for (i = 0; i < n; i++)
		s += d[i] + onstk[i];
	d[100] = s;
	d[101] = sc(SYS_getuid, 0, 0, 0);
	d[102] = sc(SYS_open, 0, 0, 0);
	asm volatile("mov %%fs:8, %0" : "=r"(s));
	d[103] = s;
	asm volatile("int3");
	d[104] = 1;
	sc(SYS_exit, 7, 0, 0);
}
UFN static void u_read(volatile long *d, long a) { d[100] = *(volatile long *)a; sc(SYS_exit, 1, 0, 0); }
UFN static void u_write(volatile long *d, long a) { *(volatile long *)a = 5; sc(SYS_exit, 1, 0, 0); }
UFN static void u_exec(volatile long *d, long a) { ((void (*)(void))a)(); sc(SYS_exit, 1, 0, 0); }
UFN static void u_cli(volatile long *d, long a) { asm volatile("cli"); sc(SYS_exit, 1, 0, 0); }
UFN static void u_cr3(volatile long *d, long a) { long r; asm volatile("mov %%cr3, %0" : "=r"(r)); d[100] = r; sc(SYS_exit, 1, 0, 0); }
UFN static void u_div(volatile long *d, long a) { asm volatile("div %%ecx" : : "a"(1), "d"(0), "c"(0)); sc(SYS_exit, 1, 0, 0); }

static void on_pf(uintptr_t addr, uint64_t fec, struct dune_tf *tf)
{
	nflt++; flt = addr; fltfec = fec;
	if ((tf->cs & 3) == 0) { dune_printf("own fault at %lx\n", addr); dune_dump_trap_frame(tf); dune_die(); }
	dune_ret_from_user(VIOLATION);
}
static void on_gp(struct dune_tf *tf) { ngp++; dune_ret_from_user(PRIV); }
static void on_de(struct dune_tf *tf) { nde++; dune_ret_from_user(DIVZERO); }
static void on_bp(struct dune_tf *tf) { nbp += (tf->cs & 3) == 3; }
static void on_sys(struct dune_tf *tf)
{
	nsys++;
	switch (tf->rax) {
	case SYS_getuid: dune_passthrough_syscall(tf); break;
	case SYS_exit: dune_ret_from_user(ARG0(tf));
	default: nref++; tf->rax = -1L;
	}
}
static int strip(const void *arg, ptent_t *pte, void *va) { *pte &= ~(ptent_t)PTE_U; return 0; }

static int box(void (*fn)(volatile long *, long), long arg)
{
	struct dune_tf tf;

	memset(&tf, 0, sizeof tf);
	tf.rip = BOX + ((char *)fn - __start_boxtext);
	tf.rsp = BOX + 0x40000 - 8;
	tf.rdi = BOX + 0x20000;
	tf.rsi = arg;
	tf.rflags = 0x202;
	return dune_jump_to_user(&tf);
}

int main(void)
{
	volatile long *d = (long *)(BOX + 0x20000);
	static long ufs[2];
	size_t len = __stop_boxtext - __start_boxtext;
	long i, s = 0;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	CHECK(len > 0 && len < 0x10000);
	dune_register_pgflt_handler(on_pf);
	dune_register_syscall_handler(on_sys);
	CHECK(!dune_register_intr_handler(T_GPFLT, on_gp) && !dune_register_intr_handler(T_DIVIDE, on_de)
	      && !dune_register_intr_handler(T_BRKPT, on_bp));
	/* the box: code r-x, data rw-, stack rw-, all user; everything else: supervisor only */
	CHECK(dune_vm_map_pages(pgroot, (void *)BOX, 0x10000, PERM_R | PERM_W) == 0);
	memcpy((void *)BOX, __start_boxtext, len);
	CHECK(dune_vm_mprotect(pgroot, (void *)BOX, 0x10000, PERM_UCODE) == 0);
	CHECK(dune_vm_map_pages(pgroot, (void *)d, 0x4000, PERM_UTEXT) == 0);
	CHECK(dune_vm_map_pages(pgroot, (void *)(BOX + 0x30000), 0x10000, PERM_USTACK) == 0);
	CHECK(dune_vm_mprotect(pgroot, secret, PGSIZE, PERM_R | PERM_W) == 0);
	CHECK(dune_vm_page_walk(pgroot, (void *)secret, secret + PGSIZE - 1, strip, NULL) == 0);
	dune_flush_tlb();
	ufs[1] = 0x1122334455;
	memcpy((void *)(d + 200), ufs, sizeof ufs);
	dune_set_user_fs((unsigned long)(d + 200));
	CHECK(dune_get_user_fs() == (unsigned long)(d + 200));

	for (i = 0; i < 50; i++)
		d[i] = i * i, s += i * i + i;
	for (i = 0; i < 10; i++) {
		memset((void *)(d + 100), 0, 5 * sizeof *d);
		CHECK(box(u_good, 50) == 7);
		CHECK(d[100] == s && d[101] == getuid() && d[102] == -1 && d[103] == 0x1122334455 && d[104] == 1);
	}
	CHECK(nbp == 10 && nref == 10 && nsys == 30 && nflt == 0);
	CHECK(box(u_read, (long)secret) == VIOLATION && flt == (uintptr_t)secret && fltfec == 5);
	CHECK(box(u_write, (long)secret) == VIOLATION && flt == (uintptr_t)secret && fltfec == 7);
	CHECK(box(u_write, BOX + 16) == VIOLATION && flt == BOX + 16 && fltfec == 7);
	CHECK(box(u_read, BOX + 0x18000) == VIOLATION && flt == BOX + 0x18000 && fltfec == 4);
	CHECK(box(u_exec, (long)d) == VIOLATION && flt == (uintptr_t)d && (fltfec & 0x14) == 0x14);
	CHECK(box(u_exec, (long)secret) == VIOLATION);
	CHECK(box(u_read, (long)pgroot) == VIOLATION && flt == (uintptr_t)pgroot);
	CHECK(box(u_cli, 0) == PRIV && box(u_cr3, 0) == PRIV && ngp == 2);
	CHECK(box(u_div, 0) == DIVZERO && nde == 1);
	CHECK(!strcmp(secret, "secret") && nflt == 7);
	CHECK(box(u_good, 50) == 7);
	printf("%s", "");
	if (!bad)
		printf("ok ci_sandbox\n");
	return bad;
}

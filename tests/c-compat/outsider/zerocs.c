/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A frame whose cs and ss are left 0: dune_jump_to_user runs it at CPL3; dune_pop_trap_frame? */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include "libdune/dune.h"
static struct dune_tf tf;
static volatile unsigned cs[2];
static volatile int n, nsys;
static void sys(struct dune_tf *t)
{
	if (nsys++)
		dune_ret_from_user(5);
	dune_pop_trap_frame(&tf);
}
static void user(void)
{
	unsigned long v;
	for (;;) {
		asm volatile("mov %%cs, %0" : "=r"(v));
		cs[n++] = v;
		if (n == 2 && !(v & 3)) {	/* still ring 0: nothing will bring us back */
			dune_printf("ci_zerocs: after dune_pop_trap_frame cs is %lx\n", v);
			dune_die();
		}
		asm volatile("syscall" : : "a"(1000) : "rcx", "r11", "memory");
	}
}
int main(void)
{
	char *stk;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	dune_register_syscall_handler(sys);
	stk = mmap(NULL, 16 * PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(stk, 0, 16 * PGSIZE);
	tf.rip = (uint64_t)user;
	tf.rsp = (uint64_t)stk + 16 * PGSIZE - 8;
	tf.rflags = 0x202;
	if (dune_jump_to_user(&tf) != 5)
		return 1;
	printf("cs %x, %x\n", cs[0], cs[1]);
	if ((cs[0] & 3) != 3 || (cs[1] & 3) != 3)
		return 1;
	printf("ok ci_zerocs\n");
	return 0;
}

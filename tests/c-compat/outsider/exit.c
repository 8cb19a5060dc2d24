/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* on_dune_exit overridden; dune_die; the header's own assert; rdmsrl; dune_init(false). */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/wait.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_exit:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
static volatile int armed;
void on_dune_exit(struct dune_config *conf)
{
	_exit(armed ? 9 : 0);
}
static int run(int what)
{
	int st;
	pid_t p = fork();
	if (p == 0) {
		dune_enter();
		armed = 1;
		if (what == 0) dune_die();
		if (what == 1) assert(what == 2);
		exit(3);
	}
	if (waitpid(p, &st, 0) != p)
		return -1;
	printf("child %d: status %x\n", what, st);
	return st;
}
int main(void)
{
	unsigned long fs, self;

	if (dune_init(false) || dune_enter()) { printf("no dune\n"); return 1; }
	rdmsrl(MSR_FS_BASE, fs);
	asm volatile("mov %%fs:0, %0" : "=r"(self));
	CHECK(fs == self);
	fflush(stdout);
	CHECK(run(0) != 0);
	CHECK(run(1) != 0);
	CHECK(run(2) != 0);
	dune_printf("%s %d %lx\n", "dune_printf", 12, 0xabcUL);
	if (!bad)
		printf("ok ci_exit\n");
	fflush(stdout);
	return bad;
}

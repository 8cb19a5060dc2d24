/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Signals: dune_signal, dune_register_signal_handler, sigaction, in Dune mode. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <signal.h>
#include <unistd.h>
#include <setjmp.h>
#include <sys/time.h>
#include <sys/wait.h>
#include "libdune/dune.h"
#include "libdune/cpu-x86.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_signal:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
static volatile int nalrm, nusr1, nusr2, nchld, nbp, nhup, in;
static volatile uint64_t tf_rip, tf_cs;
static int val = 1234;
static sigjmp_buf jb;

static void on_alrm(int sig) { nalrm++; }
static void on_usr1(int sig, siginfo_t *si, void *uc)
{
	if (sig == SIGUSR1 && si->si_pid == getpid())
		nusr1++;
}
static void on_rt(int sig, siginfo_t *si, void *uc) { if (si->si_value.sival_ptr == &val) in++; }
static void on_usr2(struct dune_tf *tf) { nusr2++; tf_rip = tf->rip; tf_cs = tf->cs; }
static void on_chld(int sig) { nchld++; }
static void on_hup(int sig) { nhup++; siglongjmp(jb, 5); }
static void on_bp(struct dune_tf *tf) { nbp++; }

int main(void)
{
	struct sigaction sa;
	struct itimerval it = { { 0, 20000 }, { 0, 20000 } };
	sigset_t set;
	union sigval sv = { .sival_ptr = &val };
	volatile unsigned long spin = 0;
	unsigned long t0;
	pid_t pid;
	int i, st, p[2];
	char c;

	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	CHECK(dune_register_intr_handler(T_BRKPT, on_bp) == 0);

	/* dune_signal with a timer, in a loop that makes no system call, with traps among it */
	CHECK(dune_signal(SIGALRM, on_alrm) != SIG_ERR);
	CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
	t0 = dune_get_ticks();
	while (nalrm < 5 && dune_get_ticks() - t0 < 40000000000UL) {
		spin++;
		asm volatile("int3" ::: "memory");
	}
	CHECK(nalrm >= 5 && nbp == spin);
	memset(&it, 0, sizeof it);
	CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);

	/* sigaction with SA_SIGINFO */
	memset(&sa, 0, sizeof sa);
	sa.sa_sigaction = on_usr1;
	sa.sa_flags = SA_SIGINFO;
	CHECK(sigaction(SIGUSR1, &sa, NULL) == 0);
	for (i = 0; i < 10; i++)
		kill(getpid(), SIGUSR1);
	CHECK(nusr1 == 10);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	raise(SIGUSR1);
	raise(SIGUSR1);
	CHECK(nusr1 == 10);
	CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0);
	CHECK(nusr1 == 11);
	sa.sa_sigaction = on_rt;
	CHECK(sigaction(SIGRTMIN + 1, &sa, NULL) == 0);
	CHECK(sigqueue(getpid(), SIGRTMIN + 1, sv) == 0 && in == 1);

	/* a handler that sees the trap frame; the signal needs a Linux handler as well */
	CHECK(signal(SIGUSR2, on_alrm) != SIG_ERR);
	CHECK(dune_register_signal_handler(SIGUSR2, on_usr2) == 0);
	i = nalrm;
	kill(getpid(), SIGUSR2);
	for (t0 = dune_get_ticks(); nusr2 == 0 && dune_get_ticks() - t0 < 2000000000UL; )
		;
	CHECK(nusr2 == 1 && tf_rip != 0 && tf_cs == GD_KT);
	CHECK(nalrm == i);

	/* EINTR from a blocking read; a child's SIGCHLD; siglongjmp */
	sa.sa_sigaction = NULL;
	sa.sa_handler = on_chld;
	sa.sa_flags = 0;
	CHECK(sigaction(SIGCHLD, &sa, NULL) == 0);
	CHECK(pipe(p) == 0);
	pid = fork();
	if (pid == 0) {
		usleep(100000);
		_exit(3);
	}
	errno = 0;
	CHECK(read(p[0], &c, 1) == -1 && errno == EINTR);
	CHECK(nchld == 1 && waitpid(pid, &st, 0) == pid && WEXITSTATUS(st) == 3);
	sa.sa_handler = on_hup;
	CHECK(sigaction(SIGHUP, &sa, NULL) == 0);
	i = sigsetjmp(jb, 1);
	if (i == 0) {
		raise(SIGHUP);
		CHECK(0);
	}
	CHECK(i == 5 && nhup == 1);
	nbp = 0;
	asm volatile("int3" ::: "memory");
	CHECK(nbp == 1);

	/* a child killed by a signal is seen as such */
	pid = fork();
	if (pid == 0) {
		kill(getpid(), SIGTERM);
		_exit(1);
	}
	CHECK(waitpid(pid, &st, 0) == pid && WIFSIGNALED(st) && WTERMSIG(st) == SIGTERM);
	if (!bad)
		printf("ok ci_signal\n");
	return bad;
}

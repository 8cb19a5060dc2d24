/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Signals: handlers run in Dune mode; those with a trap frame change what the program goes on with.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>

#include "libdune/dune.h"

static volatile sig_atomic_t usr1, usr2, alarms, spins;
static unsigned long handler_cs;
static char *stack;

static unsigned short code_segment(void)
{
	unsigned short cs;

	__asm__ volatile("mov %%cs, %0" : "=r"(cs));
	return cs;
}

static void on_usr1(int signal)
{
	assert(signal == SIGUSR1);
	handler_cs = code_segment();
	usr1++;
}

static void on_usr2(struct dune_tf *tf)
{
	usr2++;
	handler_cs = tf->cs;
	if (tf->rbx == 0x1234) {
		tf->rbx = 0x5678;
		tf->r13 = 0x9abc;
	}
}

static void on_alarm(struct dune_tf *tf)
{
	(void)tf;
	alarms++;
}

static void start_timer(void)
{
	struct itimerval timer = { .it_value = { .tv_usec = 2000 } };

	assert(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

static void on_alarm_at_cpl3(struct dune_tf *tf)
{
	(void)tf;
	alarms++;
	/* The time of the code at CPL3 is over, if it has begun. */
	if (spins)
		dune_ret_from_user(88);
	start_timer();
}

static void user_spins(void)
{
	for (;;)
		spins = 1;
}

static void test_plain_handler(void)
{
	assert(dune_signal(SIGUSR1, on_usr1) == SIG_DFL);
	assert(raise(SIGUSR1) == 0);
	assert(usr1 == 1 && handler_cs == GD_KT);
	assert(dune_signal(SIGUSR1, SIG_IGN) == on_usr1);
	assert(raise(SIGUSR1) == 0 && usr1 == 1);
	assert(dune_signal(12345, on_usr1) == SIG_ERR);
}

static void test_handler_with_a_frame(void)
{
	unsigned long rbx = 0x1234, r13, result;

	assert(dune_register_signal_handler(SIGUSR2, on_usr2) == 0);
	/* kill(getpid(), SIGUSR2), with registers that the handler changes. */
	__asm__ volatile("syscall\n\tmov %%r13, %1"
			 : "+b"(rbx), "=r"(r13), "=a"(result)
			 : "2"(62L), "D"((long)getpid()), "S"((long)SIGUSR2)
			 : "rcx", "r11", "r13", "memory");
	assert(result == 0 && usr2 == 1);
	assert(rbx == 0x5678 && r13 == 0x9abc);
	assert(handler_cs == GD_KT);
	assert(dune_register_signal_handler(SIGKILL, on_usr2) < 0);
	assert(dune_register_signal_handler(-1, on_usr2) < 0);
}

static void test_timer(void)
{
	assert(dune_register_signal_handler(SIGALRM, on_alarm) == 0);
	start_timer();
	/* The CPU is busy with the program's own code. */
	while (!alarms)
		__asm__ volatile("pause");
	assert(alarms == 1);
}

static void test_timer_at_cpl3(void)
{
	struct dune_tf tf = { 0 };
	sigset_t mask;

	assert(dune_register_signal_handler(SIGALRM, on_alarm_at_cpl3) == 0);
	start_timer();
	tf.rip = (unsigned long)user_spins;
	tf.rsp = (unsigned long)stack + 65536 - 8;
	assert(dune_jump_to_user(&tf) == 88);
	assert(alarms >= 2 && (code_segment() & 3) == 0);
	/* As after siglongjmp without a mask. */
	sigemptyset(&mask);
	assert(sigprocmask(SIG_SETMASK, &mask, NULL) == 0);
}

int main(void)
{
	stack = aligned_alloc(4096, 65536);
	assert(stack);
	assert(dune_init_and_enter() == 0);
	test_plain_handler();
	test_handler_with_a_frame();
	test_timer();
	test_timer_at_cpl3();
	return 0;
}

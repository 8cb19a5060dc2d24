// SPDX-License-Identifier: MIT OR Apache-2.0

// A program with another C library: the clone, fork and vfork of musl are not those of glibc. Linked statically with libdune.a;
// checks itself, and ends with status 0.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

// libdune/dune.h wants a header of the BSDs that musl has not.
int dune_init(_Bool map_full);
int dune_enter(void);

#define CHECK(condition)                                                                       \
	do {                                                                                   \
		if (!(condition)) {                                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);        \
			exit(1);                                                               \
		}                                                                              \
	} while (0)

// gcc's unwinder was built for glibc, and asks it first. Negative: it looks by itself.
int _dl_find_object(void *pc, void *result)
{
	(void)pc;
	(void)result;
	return -1;
}

static unsigned privilege(void)
{
	unsigned short cs;

	__asm__ volatile("mov %%cs, %0" : "=r"(cs));
	return cs & 3;
}

static _Thread_local int own;
static atomic_int detached;

static void *thread(void *argument)
{
	char *memory = malloc(10000);

	memset(memory, 1, 10000);
	free(memory);
	own += *(int *)argument;
	*(int *)argument = privilege() == 0 ? own + 1 : -1;
	return argument;
}

static void *detached_thread(void *argument)
{
	detached += privilege() == 0 ? 1 : 1000;
	return argument;
}

static volatile sig_atomic_t handled;

static void handler(int signal)
{
	handled = privilege() == 0 ? signal : -1;
}

static int status_of(pid_t pid)
{
	int status;

	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status));
	return WEXITSTATUS(status);
}

int main(void)
{
	char *arguments[] = { "/bin/busybox", "sh", "-c", "exit 5", NULL };
	char *environment[] = { NULL };
	pthread_attr_t attributes;
	pthread_t threads[8];
	int values[8];
	pid_t pid;

	CHECK(privilege() == 3);
	CHECK(dune_init(0) == 0 && dune_enter() == 0);
	CHECK(privilege() == 0);

	for (int round = 0; round < 5; round++) {
		for (int i = 0; i < 8; i++) {
			values[i] = 10 * i;
			CHECK(pthread_create(&threads[i], NULL, thread, &values[i]) == 0);
		}
		for (int i = 0; i < 8; i++) {
			CHECK(pthread_join(threads[i], NULL) == 0);
			CHECK(values[i] == 10 * i + 1);
		}
	}

	// Nobody joins them: each unmaps its own stack at its end.
	CHECK(pthread_attr_init(&attributes) == 0);
	CHECK(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0);
	for (int i = 0; i < 8; i++)
		CHECK(pthread_create(&threads[0], &attributes, detached_thread, NULL) == 0);
	for (int i = 0; detached < 8 && i < 5000; i++)
		usleep(1000);
	CHECK(detached == 8);

	CHECK(posix_spawn(&pid, arguments[0], NULL, NULL, arguments, environment) == 0);
	CHECK(status_of(pid) == 5);
	pid = fork();
	if (pid == 0) {
		CHECK(pthread_create(&threads[0], NULL, thread, &values[0]) == 0 && pthread_join(threads[0], NULL) == 0);
		_exit(values[0] > 0 && privilege() == 0 ? 6 : 1);
	}
	CHECK(status_of(pid) == 6);
	pid = vfork();
	if (pid == 0)
		_exit(privilege() == 0 ? 7 : 1);
	CHECK(status_of(pid) == 7);
	CHECK(WEXITSTATUS(system("exit 4")) == 4);

	CHECK(signal(SIGUSR1, handler) != SIG_ERR);
	CHECK(raise(SIGUSR1) == 0 && handled == SIGUSR1);
	CHECK(privilege() == 0);
	return 0;
}

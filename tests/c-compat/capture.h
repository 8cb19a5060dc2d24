/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a function writes to standard output.
 */
#pragma once

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CAPTURED 65536

static char captured[CAPTURED];
static int capture_kept = -1, capture_pipe[2];

/* What is written goes into a pipe, which holds as much. */
static inline void begin_capture(void)
{
	assert(fflush(stdout) == 0);
	capture_kept = dup(STDOUT_FILENO);
	assert(capture_kept >= 0 && pipe(capture_pipe) == 0);
	assert(dup2(capture_pipe[1], STDOUT_FILENO) == STDOUT_FILENO && close(capture_pipe[1]) == 0);
}

/* It is in `captured`. */
static inline void end_capture(void)
{
	size_t used = 0;
	ssize_t got;

	assert(dup2(capture_kept, STDOUT_FILENO) == STDOUT_FILENO && close(capture_kept) == 0);
	while ((got = read(capture_pipe[0], captured + used, CAPTURED - 1 - used)) > 0)
		used += got;
	assert(got == 0 && close(capture_pipe[0]) == 0);
	captured[used] = 0;
}

/* Whether a line was written that has these texts, in this order. */
static inline int wrote(const char *first, const char *second)
{
	const char *line = captured, *end, *at;

	for (; (end = strchr(line, '\n')); line = end + 1) {
		at = strstr(line, first);
		if (!at || at >= end)
			continue;
		at = strstr(at + strlen(first), second);
		if (at && at + strlen(second) <= end)
			return 1;
	}
	return 0;
}

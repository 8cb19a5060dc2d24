/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What of libdune/dune.h is no function of the library. Include that.
 */
#pragma once

#include "fpu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Top table of the default page table. */
extern ptent_t *pgroot;

/* A struct page for each page of the pool, and how many there are. */
extern struct page *pages;
extern int num_pages;
/* Physical address of the first: also its address in the process. */
extern uintptr_t dune_page_base;
#define PAGEBASE dune_page_base
#define MAX_PAGES (1ul << 18)

/*
 * The program may define it: it is called, outside Dune mode, before a Dune thread that cannot go on ends the process.
 */
void on_dune_exit(struct dune_config *config);

#ifdef __cplusplus
}
#endif

static inline unsigned long dune_get_ticks(void)
{
	unsigned int low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return low | (unsigned long)high << 32;
}

/* printf to standard output, at once: what handlers may use. Up to 1,023 bytes. */
static inline int dune_printf(const char *fmt, ...)
{
	va_list arguments;
	int result;

	va_start(arguments, fmt);
	result = dune_vprintf(fmt, arguments);
	va_end(arguments);
	return result;
}

/* dune_init(true) and dune_enter. */
static inline int dune_init_and_enter(void)
{
	int result = dune_init(true);

	return result ? result : dune_enter();
}

#ifndef assert
#define assert(expr)                                                                                   \
	do {                                                                                           \
		if (!(expr)) {                                                                         \
			dune_printf("ASSERT(%s) at %s:%d in function %s\n", #expr, __FILE__, __LINE__, \
				    __func__);                                                         \
			dune_die();                                                                    \
		}                                                                                      \
	} while (0)
#endif

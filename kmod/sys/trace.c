// SPDX-License-Identifier: GPL-2.0
/* Makes the tracepoints of dune_trace.h, and the functions by which Rust reaches them. */

#include <linux/bitops.h>
#include <linux/module.h>

#define CREATE_TRACE_POINTS
#include "dune_trace.h"

u32 dune_traced;

#ifdef CONFIG_TRACEPOINTS
/* Linux calls these under its own mutex. */
#define DUNE_LISTENERS(name, bit)				\
	int dune_trace_##name##_on(void)			\
	{							\
		WRITE_ONCE(dune_traced, dune_traced | (bit));	\
		return 0;					\
	}							\
								\
	void dune_trace_##name##_off(void)			\
	{							\
		WRITE_ONCE(dune_traced, dune_traced & ~(bit));	\
	}

DUNE_LISTENERS(exit, DUNE_TRACE_EXIT)
DUNE_LISTENERS(ept_violation, DUNE_TRACE_EPT_VIOLATION)
DUNE_LISTENERS(invalidate, DUNE_TRACE_INVALIDATE)
DUNE_LISTENERS(entry_failed, DUNE_TRACE_ENTRY_FAILED)
#endif

void dune_trace_exit(u64 space, const struct dune_traced_exit *exit)
{
	trace_dune_exit(space, exit);
}

void dune_trace_ept_violation(u64 space, const struct dune_traced_violation *violation)
{
	trace_dune_ept_violation(space, violation);
}

void dune_trace_invalidate(u64 space, u64 start, u64 end, bool flushed)
{
	trace_dune_invalidate(space, start, end, flushed);
}

void dune_trace_entry_failed(u64 space, u32 reason, u64 qualification, u32 instruction_error)
{
	trace_dune_entry_failed(space, reason, qualification, instruction_error);
}

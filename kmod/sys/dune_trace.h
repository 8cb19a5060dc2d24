/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints: /sys/kernel/tracing/events/dune/, `perf trace -e 'dune:*'`. trace.c makes them. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM dune

#if !defined(DUNE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define DUNE_TRACE_H

#include <linux/tracepoint.h>
#include <asm/vmx.h>

#include "helpers.h"

#ifndef DUNE_TRACE_NAMES
#define DUNE_TRACE_NAMES
/* Each says that somebody listens, or that nobody does any more. */
int dune_trace_exit_on(void);
void dune_trace_exit_off(void);
int dune_trace_ept_violation_on(void);
void dune_trace_ept_violation_off(void);
int dune_trace_invalidate_on(void);
void dune_trace_invalidate_off(void);
int dune_trace_entry_failed_on(void);
void dune_trace_entry_failed_off(void);
#endif

/* A VM exit, before anything is done about it. */
TRACE_EVENT_FN(dune_exit,
	TP_PROTO(u64 space, const struct dune_traced_exit *exit),
	TP_ARGS(space, exit),
	TP_STRUCT__entry(
		__field(u64, space)
		__field(u32, reason)
		__field(u32, cpl)
		__field(u64, rip)
		__field(u64, qualification)
		__field(u64, rax)
	),
	TP_fast_assign(
		__entry->space = space;
		__entry->reason = exit->reason;
		__entry->cpl = exit->cpl;
		__entry->rip = exit->rip;
		__entry->qualification = exit->qualification;
		__entry->rax = exit->rax;
	),
	TP_printk("space %llu reason %s%s rip 0x%llx cpl %u qualification 0x%llx rax 0x%llx",
		__entry->space, __print_symbolic(__entry->reason & 0xffff, VMX_EXIT_REASONS),
		__entry->reason >> 31 ? " (entry failed)" : "",
		__entry->rip, __entry->cpl, __entry->qualification, __entry->rax),
	dune_trace_exit_on, dune_trace_exit_off
);

/* An EPT violation, and what became of it. Of the addresses hva is 0 where it was not asked for. */
TRACE_EVENT_FN(dune_ept_violation,
	TP_PROTO(u64 space, const struct dune_traced_violation *violation),
	TP_ARGS(space, violation),
	TP_STRUCT__entry(
		__field(u64, space)
		__field(u64, gpa)
		__field(u64, gva)
		__field(u64, hva)
		__field(u32, access)
		__field(u32, outcome)
		__field(u32, mem_type)
	),
	TP_fast_assign(
		__entry->space = space;
		__entry->gpa = violation->gpa;
		__entry->gva = violation->gva;
		__entry->hva = violation->hva;
		__entry->access = violation->access;
		__entry->outcome = violation->outcome;
		__entry->mem_type = violation->mem_type;
	),
	TP_printk("space %llu gpa 0x%llx gva 0x%llx hva 0x%llx access %s outcome %s type %s",
		__entry->space, __entry->gpa, __entry->gva, __entry->hva,
		__print_flags(__entry->access, "", { 1, "r" }, { 2, "w" }, { 4, "x" }),
		__print_symbolic(__entry->outcome,
			{ DUNE_TRACED_MAPPED_4K, "mapped-4k" }, { DUNE_TRACED_MAPPED_2M, "mapped-2m" },
			{ DUNE_TRACED_AGAIN, "again" }, { DUNE_TRACED_TOUCH, "touch" },
			{ DUNE_TRACED_REFUSED, "refused" }, { DUNE_TRACED_NO_SLOT, "no-slot" }),
		__print_symbolic(__entry->mem_type,
			{ 0, "uc" }, { 1, "wc" }, { 4, "wt" }, { 5, "wp" }, { 6, "wb" }, { DUNE_TRACED_NO_TYPE, "none" })),
	dune_trace_ept_violation_on, dune_trace_ept_violation_off
);

/* Linux changes mappings: what the EPT had of the range is gone. */
TRACE_EVENT_FN(dune_invalidate,
	TP_PROTO(u64 space, u64 start, u64 end, bool flushed),
	TP_ARGS(space, start, end, flushed),
	TP_STRUCT__entry(
		__field(u64, space)
		__field(u64, start)
		__field(u64, end)
		__field(bool, flushed)
	),
	TP_fast_assign(
		__entry->space = space;
		__entry->start = start;
		__entry->end = end;
		__entry->flushed = flushed;
	),
	TP_printk("space %llu hva 0x%llx-0x%llx %s", __entry->space, __entry->start, __entry->end,
		__entry->flushed ? "flushed" : "nothing-mapped"),
	dune_trace_invalidate_on, dune_trace_invalidate_off
);

/* A VM entry that failed: by an exit with that reason, or by an instruction error. */
TRACE_EVENT_FN(dune_entry_failed,
	TP_PROTO(u64 space, u32 reason, u64 qualification, u32 instruction_error),
	TP_ARGS(space, reason, qualification, instruction_error),
	TP_STRUCT__entry(
		__field(u64, space)
		__field(u32, reason)
		__field(u32, instruction_error)
		__field(u64, qualification)
	),
	TP_fast_assign(
		__entry->space = space;
		__entry->reason = reason;
		__entry->instruction_error = instruction_error;
		__entry->qualification = qualification;
	),
	TP_printk("space %llu reason 0x%x qualification 0x%llx instruction-error %u", __entry->space, __entry->reason,
		__entry->qualification, __entry->instruction_error),
	dune_trace_entry_failed_on, dune_trace_entry_failed_off
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE dune_trace
#include <trace/define_trace.h>

/* SPDX-License-Identifier: GPL-2.0 */
/* This CPU, and a count of its interrupts. */
#ifndef DUNE_HERE_H
#define DUNE_HERE_H

#include <linux/percpu.h>
#include <linux/smp.h>
#include <asm/hardirq.h>

#include "helpers.h"

DECLARE_PER_CPU(unsigned int, dune_interrupts_asked);

/*
 * Interrupts of the kinds in which perf programs the PMU on this CPU, and membarrier calls on it, and NMIs. Where the
 * kernel does not count them so (Kbuild looks): another number each time.
 */
static __always_inline unsigned int dune_interrupt_count(void)
{
#if defined(DUNE_HAS_IRQ_COUNTS)
	return this_cpu_read(irq_stat.counts[IRQ_COUNT_NMI]) + this_cpu_read(irq_stat.counts[IRQ_COUNT_APIC_TIMER]) +
	       this_cpu_read(irq_stat.counts[IRQ_COUNT_CALL_FUNCTION]);
#elif defined(DUNE_HAS_IRQ_STAT)
	return this_cpu_read(irq_stat.__nmi_count) + this_cpu_read(irq_stat.apic_timer_irqs) +
	       this_cpu_read(irq_stat.irq_call_count);
#else
	return this_cpu_inc_return(dune_interrupts_asked);
#endif
}

/* With interrupts off. */
static __always_inline struct dune_here dune_here(void)
{
	return (struct dune_here){ smp_processor_id(), dune_interrupt_count() };
}

#endif

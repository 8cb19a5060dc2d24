// SPDX-License-Identifier: GPL-2.0
/*
 * Linux' user-return notifier (linux/user-return-notifier.h): called last before a thread goes to user mode on a CPU, with
 * interrupts off. One for each CPU. It is registered there while the thread that runs waits for a system call to come back, and
 * takes itself off the CPU when another one goes to user mode first, so that only threads in Dune mode pay for it.
 *
 * Only the CPU itself, in a thread and with interrupts off, puts it into the list or takes it out: KVM changes the list with
 * interrupts on.
 */
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/sched/task_stack.h>
#include <linux/smp.h>
#include <linux/user-return-notifier.h>
#include <asm/ptrace.h>

#include "helpers.h"
#include "here.h"

struct dune_user_return {
	struct user_return_notifier notifier;
	/* The CPU's list of notifiers; NULL: ours is not in it. */
	struct hlist_node **list;
	/* Who waits, for whose vCPU, and what is to be done. The vCPU is NULL where nobody does. */
	struct task_struct *task;
	struct mm_struct *mm;
	void *vcpu;
	void (*go_on)(void *vcpu, struct dune_here here);
};

static DEFINE_PER_CPU(struct dune_user_return, dune_user_return);

/* Whether no other notifier is in the CPU's list. */
static __always_inline bool dune_is_alone(const struct dune_user_return *here)
{
	return !here->notifier.link.next && here->notifier.link.pprev == here->list;
}

static void dune_user_return_off(struct dune_user_return *here)
{
	here->list = NULL;
	user_return_notifier_unregister(&here->notifier);
}

static void dune_going_to_user_mode(struct user_return_notifier *notifier)
{
	struct dune_user_return *here = container_of(notifier, struct dune_user_return, notifier);

	/* Once: another CPU may take it away. By the other two it is there then: see dune_user_return_forget. */
	void *vcpu = READ_ONCE(here->vcpu);
	const struct pt_regs *regs;

	if (unlikely(!vcpu || here->task != current || here->mm != current->mm)) {
		dune_user_return_off(here);
		return;
	}
	/* Linux has looked for work already; back to 64-bit code, without a trap behind its next instruction. */
	regs = task_pt_regs(current);
	if (likely(!(read_thread_flags() & dune_flags_before_shortcut) && dune_is_alone(here) &&
		   regs->cs == __USER_CS && !(regs->flags & X86_EFLAGS_TF)))
		here->go_on(vcpu, dune_here());
}

/*
 * Has the current thread call go_on(vcpu) when it goes to user mode on this CPU and nothing is to be done before. With interrupts
 * off.
 */
void dune_user_return_wait(void *vcpu, void (*go_on)(void *vcpu, struct dune_here here))
{
	struct dune_user_return *here = this_cpu_ptr(&dune_user_return);

	here->task = current;
	here->mm = current->mm;
	here->go_on = go_on;
	WRITE_ONCE(here->vcpu, vcpu);
	if (!here->list) {
		here->notifier.on_user_return = dune_going_to_user_mode;
		user_return_notifier_register(&here->notifier);
		here->list = here->notifier.link.pprev;
	}
}

/*
 * No CPU begins to use that vCPU from here on. Whoever frees it and is not its thread has to know that the thread is not on its
 * way to user mode: that it ends, or has another mm, or that each CPU took an interrupt since.
 */
void dune_user_return_forget(void *vcpu)
{
	unsigned int cpu;

	for_each_possible_cpu(cpu) {
		void **waiting = &per_cpu(dune_user_return, cpu).vcpu;

		if (READ_ONCE(*waiting) == vcpu)
			cmpxchg(waiting, vcpu, NULL);
	}
}

/* Takes the notifier off this CPU. In a thread, with interrupts off. */
void dune_user_return_stop(void)
{
	struct dune_user_return *here = this_cpu_ptr(&dune_user_return);

	WRITE_ONCE(here->vcpu, NULL);
	if (here->list)
		dune_user_return_off(here);
}

/* Whether no notifier is in this CPU's list but ours: KVM's is there while a guest's MSRs may be. With interrupts off. */
bool dune_user_return_is_ours(void)
{
	struct dune_user_return *here = this_cpu_ptr(&dune_user_return);

	return here->list && dune_is_alone(here);
}

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C macros and inline functions of the kernel, as functions. Each forwards and does nothing else; what must be noinstr
 * or is a macro that only C can expand is here too.
 */
#ifndef DUNE_HELPERS_H
#define DUNE_HELPERS_H

#include <linux/types.h>
#include <linux/version.h>

#include "../vmx/vmenter.h"
#include "heavy.h"

struct file;
struct iov_iter;
struct kiocb;
struct mm_struct;
struct module;
struct page;
struct pt_regs;
struct task_struct;
struct vm_area_struct;

/* Module parameters. */
extern unsigned int dune_param_gpa_bits;
extern unsigned int dune_param_max_vcpus;
extern char *dune_param_kvm_helper;
extern unsigned int dune_param_user_spaces;
extern unsigned int dune_param_user_vcpus;

#ifdef DUNE_DEBUG_KNOBS
void dune_knob_fault_delay(void);
bool dune_knob_has_fault_delay(void);
void dune_knob_slot_delay(void);
void dune_knob_flush_delay(void);
void dune_knob_invalidate_delay(void);
void dune_knob_open_delay(void);
void dune_knob_frames(void *dir);
#endif

/* Build configuration. */
bool dune_kvm_intel_builtin(void);
struct module *dune_this_module(void);

#define DUNE_MODULE_ABSENT 0
#define DUNE_MODULE_COMING 1
#define DUNE_MODULE_LIVE 2
int dune_module_state(const char *name);
const char *dune_module_name(const struct module *mod);

/* Locks. One function per lock class. */
unsigned long dune_spinlock_bytes(void);
void dune_space_lock_init(void *lock);
void dune_vcpus_lock_init(void *lock);
void dune_global_lock_init(void *lock);
void dune_registry_lock_init(void *lock);
void dune_spin_lock(void *lock);
bool dune_spin_trylock(void *lock);
void dune_spin_unlock(void *lock);
unsigned long dune_spin_lock_irqsave(void *lock);
void dune_spin_unlock_irqrestore(void *lock, unsigned long flags);
void dune_owner_mutex_lock(void);
void dune_owner_mutex_unlock(void);

/* CPUs. */
/* This CPU, and a count of interrupts on it (see helpers.c). Both come in registers. */
struct dune_here {
	unsigned long cpu;
	unsigned long interrupts;
};
struct dune_here dune_irq_disable(void);
/* 1: that number stays where no interrupt came. */
#if defined(DUNE_HAS_IRQ_COUNTS) || defined(DUNE_HAS_IRQ_STAT)
enum { DUNE_INTERRUPTS_ARE_COUNTED = 1 };
#else
enum { DUNE_INTERRUPTS_ARE_COUNTED = 0 };
#endif
void dune_window_end(void);
void dune_window_end_off(void);
void dune_irq_enable(void);
void dune_interrupt_soon(void);
void dune_preempt_disable(void);
void dune_preempt_enable(void);
unsigned int dune_cpu(void);
unsigned int dune_nr_cpu_ids(void);
bool dune_cpu_has_itlb_multihit(void);
bool dune_cpu_has_fsgsbase(void);
bool dune_cpu_has_enqcmd(void);
bool dune_cpu_has_fred(void);

/* Mitigations (mitigations.c). */
int dune_l1tf_start(void);
void dune_l1tf_stop(void);
extern bool dune_l1d_flushes;
void dune_l1tf_before_entry(bool host_ran);
void dune_ibpb(void);
bool dune_cpu_has_pebs(void);
bool dune_cpu_has_xfd(void);
void dune_xfd_err_clear(void);

/* Memory. */
unsigned long dune_get_zeroed_page(void);
void dune_free_page(unsigned long addr);
void *dune_kvzalloc(size_t bytes);
void dune_kvfree(const void *p);
void dune_page_set_link(unsigned long addr, unsigned long link);
unsigned long dune_page_link(unsigned long addr);
struct page *dune_virt_to_page(const void *addr);
u64 dune_virt_to_phys(const void *addr);
void *dune_phys_to_virt(u64 pa);
unsigned long dune_copy_from_user(void *to, const void __user *from, unsigned long n);
unsigned long dune_copy_from_user_now(void *to, const void __user *from, unsigned long n);
unsigned long dune_copy_to_user(void __user *to, const void *from, unsigned long n);

/* The process and its mm. */
struct mm_struct *dune_current_mm(void);
void *dune_mm_pgd(struct mm_struct *mm);
bool dune_mmap_read_trylock(struct mm_struct *mm);
int dune_mmap_read_lock(struct mm_struct *mm);
int dune_mmap_write_lock(struct mm_struct *mm);
void dune_mmap_write_unlock(struct mm_struct *mm);
void dune_mmap_read_unlock(struct mm_struct *mm);
struct vm_area_struct *dune_vma_at(struct mm_struct *mm, unsigned long addr);
unsigned long dune_vma_start(const struct vm_area_struct *vma);
unsigned long dune_vma_pgoff(const struct vm_area_struct *vma);
unsigned long dune_vma_bytes(const struct vm_area_struct *vma);
bool dune_vma_has_access(const struct vm_area_struct *vma, bool write);
bool dune_vma_is_executable(const struct vm_area_struct *vma);
bool dune_vma_is_userfaultfd(const struct vm_area_struct *vma);
void dune_vma_set_run_page_flags(struct vm_area_struct *vma);
bool dune_vma_is_shared(const struct vm_area_struct *vma);
int dune_vma_insert_page(struct vm_area_struct *vma, struct page *page);

#define DUNE_FAULT_DONE 0
#define DUNE_FAULT_DONE_UNLOCKED 1
#define DUNE_FAULT_FAILED 2
int dune_handle_mm_fault(struct vm_area_struct *vma, unsigned long addr, bool write, bool execute);

/* The thread. */
struct task_struct *dune_current(void);
/* The calling thread; both come in registers. */
struct dune_caller {
	struct task_struct *task;
	struct mm_struct *mm;
};
struct dune_caller dune_caller(void);
struct task_struct *dune_get_current(void);
void dune_put_task(struct task_struct *task);

/* Words of a task that tell without a call what it came to; valid as long as the task is allocated. */
struct dune_task_words {
	const unsigned long *flags;	/* of the thread */
	const unsigned long *nvcsw;	/* how often it was switched out: by its own will, and not */
	const unsigned long *nivcsw;
	struct pt_regs *regs;	/* of its system call */
};
void dune_task_words(struct task_struct *task, struct dune_task_words *words);
/* Of its flags: those with which a thread does not enter a guest as it is, and that by which CPUID faults. */
extern const unsigned long dune_flags_before_entry;
extern const unsigned long dune_flags_before_settling;	/* either */
extern const unsigned long dune_flag_user_return;	/* of the first: a notifier, which may be ours alone */
extern const unsigned long dune_flags_before_shortcut;
extern const unsigned long dune_flag_cpuid_faults;
bool dune_task_is_exiting(const struct task_struct *task);
bool dune_task_has_mm(const struct task_struct *task, const struct mm_struct *mm);
u64 dune_rseq(u32 *signature);
bool dune_rseq_is_due(void);
void dune_rseq_note_irq(void);
bool dune_rseq_is_true(void);
bool dune_signal_pending(void);
bool dune_work_pending(void);
bool dune_user_work_pending(void);
/* False for a signal. */
bool dune_do_user_work(void);
void dune_get_file(struct file *file);
bool dune_plain_read(struct kiocb *iocb, struct iov_iter *to, struct file **file, u64 *buffer, u64 *count);
void dune_cond_resched(void);
u32 dune_charged_uid(void);
bool dune_may_exceed(void);
void dune_wait_until_zero(const unsigned long *count);
void dune_yield(void);
void *dune_file_private(const struct file *file);
void dune_file_set_private(struct file *file, void *data);

/* CPU state of the host. */

/* 1: Linux has no way for us to load the thread's extended state for good, so that it is lent to a guest (fpu.c). */
#define DUNE_LENDS_FPU (LINUX_VERSION_CODE >= KERNEL_VERSION(6, 19, 0))
enum { DUNE_FPU_IS_LENT = DUNE_LENDS_FPU };
enum {
	DUNE_USER_STATE_LOADED,
	DUNE_USER_STATE_IN_MEMORY,	/* the extended state; all else is loaded */
	DUNE_USER_STATE_ELSEWHERE,	/* MSRs: only the way to user mode loads them */
};
unsigned int dune_user_state_load(void);	/* one of these */
u64 dune_fpu_lend(void);
void dune_fpu_give_back(u64 xfd);
bool dune_user_return_pending(void);
/* See user_return.c. */
void dune_user_return_wait(void *vcpu, void (*go_on)(void *vcpu, struct dune_here here));
void dune_user_return_forget(void *vcpu);
void dune_user_return_stop(void);
bool dune_user_return_is_ours(void);
u32 dune_pkru(void);
void dune_pkru_write(u32 pkru);
unsigned long dune_read_cr0(void);
void dune_cr4_set_vmxe(void);
void dune_cr4_clear_vmxe(void);
unsigned long dune_fs_base(void);
unsigned long dune_percpu_base(void);
unsigned long dune_tss_base(void);
void dune_after_exit(void);
int dune_rdmsr_safe(u32 msr, u64 *value);
u64 dune_xcr0(void);
bool dune_may_own_vmx(void);
void dune_vmx_emergency_register(void (*off)(void));
void dune_vmx_emergency_unregister(void (*off)(void));
void dune_intel_pt_vmx(bool on);

/* The device node. */
struct file_operations;
int dune_chrdev_register(const struct file_operations *fops);
void dune_chrdev_unregister(void);

/* Other modules' files, and user mode helpers. */
struct cred;
struct subprocess_info;
const struct module *dune_file_module(const struct file *file);
/* Runs a program as root; returns when it has ended, with its wait status or why it was not started. */
int dune_umh_run(const char *path, int (*init)(struct subprocess_info *info, struct cred *new));

/* debugfs. */
void *dune_debugfs_create_dir(const char *name, void *parent);
void dune_debugfs_create_ulong(const char *name, void *dir, unsigned long *value);
void dune_debugfs_remove(void *dir);
struct seq_file;
/* A file that `show` writes at each reading; it may not sleep. */
void dune_debugfs_create_text(const char *name, void *dir, int (*show)(struct seq_file *));
void dune_seq_text(struct seq_file *to, const char *text);
/* "dune-NAME:\tVALUE\n", and "dune-exits-REASON:\tVALUE\n". */
void dune_seq_named(struct seq_file *to, const char *name, u64 value);
void dune_seq_exits(struct seq_file *to, u32 reason, u64 value);
void dune_seq_words(struct seq_file *to, const char *words, unsigned int bytes);
/* " 0xVALUE\n". */
void dune_seq_hex(struct seq_file *to, unsigned int digits, u64 value);
bool dune_seq_may_see_addresses(struct seq_file *to);
/* The number and a space. */
void dune_seq_number(struct seq_file *to, u64 value);
/* The calling process, as the first pid namespace has it. */
int dune_current_pid(void);

/* Tracepoints (trace.c). Which of them somebody listens to, as bits; 0 in kernels without. */
#define DUNE_TRACE_EXIT 1
#define DUNE_TRACE_EPT_VIOLATION 2
#define DUNE_TRACE_INVALIDATE 4
#define DUNE_TRACE_ENTRY_FAILED 8
extern u32 dune_traced;
struct dune_traced_exit {
	u32 reason;
	u32 cpl;
	u64 rip;
	u64 qualification;
	u64 rax;
};
void dune_trace_exit(u64 space, const struct dune_traced_exit *exit);
#define DUNE_TRACED_MAPPED_4K 0
#define DUNE_TRACED_MAPPED_2M 1
#define DUNE_TRACED_AGAIN 2
#define DUNE_TRACED_TOUCH 3
#define DUNE_TRACED_REFUSED 4
#define DUNE_TRACED_NO_SLOT 5
#define DUNE_TRACED_NO_TYPE 8
struct dune_traced_violation {
	u64 gpa;
	u64 gva;
	u64 hva;
	u32 access;	/* 1 read, 2 write, 4 execute */
	u32 outcome;
	u32 mem_type;	/* of what was mapped, as the SDM numbers them */
};
void dune_trace_ept_violation(u64 space, const struct dune_traced_violation *violation);
void dune_trace_invalidate(u64 space, u64 start, u64 end, bool flushed);
void dune_trace_entry_failed(u64 space, u32 reason, u64 qualification, u32 instruction_error);

/* Calls `f(arg)` on `cpu` and waits for it. */
void dune_call_on(unsigned int cpu, void (*f)(void *), void *arg);
int dune_cpuhp_setup(const char *name, int (*up)(unsigned int), int (*down)(unsigned int));
void dune_cpuhp_remove(int state);
void dune_on_each_cpu(void (*f)(void *));
void dune_power_register(int (*suspend)(void), void (*resume)(void), void (*shutdown)(void));
void dune_power_unregister(void);
void dune_sleep_ms(unsigned int ms);
/* Has f called once in a thread of Linux, so long from now or when it was to be called anyway. One f only. */
void dune_later(void (*f)(void), unsigned int ms);
/* It is not called any more, and not being called. */
void dune_later_cancel(void);

/* The guest. */
void dune_guest_timing_enter(void);
void dune_guest_timing_exit(void);
unsigned long dune_guest_enter(void *run_page, struct dune_entry *entry);
unsigned long dune_guest_enter_slowly(void *run_page, struct dune_entry *entry, bool host_ran);
void dune_rcu_note(void);
void dune_nmi(void);
void dune_machine_check(void);

#endif

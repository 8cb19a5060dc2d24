// SPDX-License-Identifier: GPL-2.0
/* See helpers.h. */

#include <linux/context_tracking.h>
#include <linux/capability.h>
#include <linux/cpu.h>
#include <linux/cred.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/entry-common.h>
#include <linux/fs.h>
#include <linux/irq_work.h>
#include <linux/kobject.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/syscore_ops.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/suspend.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/umh.h>
#include <linux/user_namespace.h>
#include <linux/userfaultfd_k.h>
#include <linux/version.h>
#include <linux/workqueue.h>
#include <asm/cpu_entry_area.h>
#include <asm/cpufeature.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/fpu/xcr.h>
#include <asm/fsgsbase.h>
#include <asm/mce.h>
#include <asm/msr.h>
#include <asm/reboot.h>
#include <asm/tlbflush.h>
#if __has_include(<linux/entry-virt.h>)
#include <linux/entry-virt.h>
#else
#include <linux/entry-kvm.h>
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
#include <asm/intel_pt.h>
#endif
#if __has_include(<linux/rseq_entry.h>)
#include <linux/rseq_entry.h>
#endif

#include "compat.h"
#include "helpers.h"
#include "here.h"

unsigned int dune_param_gpa_bits;
module_param_named(gpa_bits, dune_param_gpa_bits, uint, 0444);
MODULE_PARM_DESC(gpa_bits, "Width of guest-physical addresses in bits, 32 to 48; 0: the CPU's (default)");

unsigned int dune_param_max_vcpus = 512;
module_param_named(max_vcpus, dune_param_max_vcpus, uint, 0444);
MODULE_PARM_DESC(max_vcpus, "Most vCPUs of one process, 1 to 4096 (default 512)");

char *dune_param_kvm_helper = "/usr/libexec/dune-kvm";
module_param_named(kvm_helper, dune_param_kvm_helper, charp, 0444);
MODULE_PARM_DESC(kvm_helper, "Program that makes a virtual machine of KVM, to share VMX with it (default /usr/libexec/dune-kvm)");

unsigned int dune_param_user_spaces = 1024;
module_param_named(user_spaces, dune_param_user_spaces, uint, 0644);
MODULE_PARM_DESC(user_spaces, "Most spaces of all processes of one user (default 1024)");

unsigned int dune_param_user_vcpus = 4096;
module_param_named(user_vcpus, dune_param_user_vcpus, uint, 0644);
MODULE_PARM_DESC(user_vcpus, "Most vCPUs of all processes of one user (default 4096)");

#ifdef DUNE_DEBUG_KNOBS
/*
 * A mistake on purpose: the harness' own tests check that it is seen. A write behind an allocation is KASAN's, a null
 * pointer an oops, what is allocated and forgotten kmemleak's.
 */
static int dune_knob_mistake(const char *val, const struct kernel_param *kp)
{
	volatile int past = 32;
	char *volatile p = NULL;

	if (sysfs_streq(val, "null")) {
		*p = 1;
	} else if (sysfs_streq(val, "warning")) {
		WARN(1, "on purpose");
	} else if (sysfs_streq(val, "out_of_bounds") || sysfs_streq(val, "leak")) {
		p = kmalloc(32, GFP_KERNEL);
		if (!p)
			return -ENOMEM;
		if (!sysfs_streq(val, "leak")) {
			p[past] = 1;
			kfree(p);
		}
	} else {
		return -EINVAL;
	}
	return 0;
}

static const struct kernel_param_ops dune_knob_mistake_ops = { .set = dune_knob_mistake };
module_param_cb(mistake, &dune_knob_mistake_ops, NULL, 0200);

static unsigned int dune_fault_delay_us;
module_param_named(fault_delay_us, dune_fault_delay_us, uint, 0600);

static unsigned int dune_slot_delay_us;
module_param_named(slot_delay_us, dune_slot_delay_us, uint, 0600);

static unsigned int dune_flush_delay_us;
module_param_named(flush_delay_us, dune_flush_delay_us, uint, 0600);

static unsigned int dune_invalidate_delay_us;
module_param_named(invalidate_delay_us, dune_invalidate_delay_us, uint, 0600);

static unsigned int dune_open_delay_ms;
module_param_named(open_delay_ms, dune_open_delay_ms, uint, 0600);

static void dune_busy(unsigned int us)
{
	while (us--)
		udelay(1);
}

/* Makes the machine know a deep sleep, from which it wakes at once. */
static int dune_knob_sleep(suspend_state_t state)
{
	return 0;
}

static const struct platform_suspend_ops dune_knob_suspend_ops = {
	.valid = suspend_valid_only_mem,
	.enter = dune_knob_sleep,
};

static int dune_knob_deep_sleep(const char *val, const struct kernel_param *kp)
{
	suspend_set_ops(val[0] == '0' ? NULL : &dune_knob_suspend_ops);
	return 0;
}

static const struct kernel_param_ops dune_knob_deep_sleep_ops = { .set = dune_knob_deep_sleep };
module_param_cb(deep_sleep, &dune_knob_deep_sleep_ops, NULL, 0200);

void dune_knob_fault_delay(void)
{
	dune_busy(READ_ONCE(dune_fault_delay_us));
}

bool dune_knob_has_fault_delay(void)
{
	return READ_ONCE(dune_fault_delay_us);
}

void dune_knob_slot_delay(void)
{
	dune_busy(READ_ONCE(dune_slot_delay_us));
}

void dune_knob_flush_delay(void)
{
	dune_busy(READ_ONCE(dune_flush_delay_us));
}

void dune_knob_invalidate_delay(void)
{
	dune_busy(READ_ONCE(dune_invalidate_delay_us));
}

void dune_knob_open_delay(void)
{
	unsigned int ms = READ_ONCE(dune_open_delay_ms);

	if (ms)
		msleep(ms);
}
#endif

/* Build configuration. */

bool dune_kvm_intel_builtin(void)
{
	return IS_BUILTIN(CONFIG_KVM_INTEL);
}

struct module *dune_this_module(void)
{
	return THIS_MODULE;
}

int dune_module_state(const char *name)
{
	/* The list of modules is private to the kernel; the set of /sys/module is not. */
	struct kobject *kobj = kset_find_obj(THIS_MODULE->mkobj.kobj.kset, name);
	const struct module *mod;
	int state = DUNE_MODULE_ABSENT;

	if (kobj) {
		/* None for a module that is part of the kernel. The reference keeps it. */
		mod = container_of(kobj, struct module_kobject, kobj)->mod;
		if (!mod || mod->state == MODULE_STATE_LIVE)
			state = DUNE_MODULE_LIVE;
		else if (mod->state != MODULE_STATE_GOING)
			state = DUNE_MODULE_COMING;
	}
	kobject_put(kobj);
	return state;
}

int dune_umh_run(const char *path, int (*init)(struct subprocess_info *info, struct cred *new))
{
	char *argv[] = { (char *)path, NULL };
	char *envp[] = { NULL };
	struct subprocess_info *info;

	info = call_usermodehelper_setup(path, argv, envp, GFP_KERNEL, init, NULL, NULL);
	if (!info)
		return -ENOMEM;
	/* Deaf to signals: the arrays are on this stack, and the callback is this module's. */
	return call_usermodehelper_exec(info, UMH_WAIT_PROC);
}

const struct module *dune_file_module(const struct file *file)
{
	return file->f_op->owner;
}

const char *dune_module_name(const struct module *mod)
{
	return mod->name;
}

/* Locks. */

static DEFINE_MUTEX(dune_owner_mutex);

unsigned long dune_spinlock_bytes(void)
{
	return sizeof(spinlock_t);
}

void dune_space_lock_init(void *lock)
{
	spin_lock_init((spinlock_t *)lock);
}

void dune_vcpus_lock_init(void *lock)
{
	spin_lock_init((spinlock_t *)lock);
}

void dune_global_lock_init(void *lock)
{
	spin_lock_init((spinlock_t *)lock);
}

void dune_registry_lock_init(void *lock)
{
	spin_lock_init((spinlock_t *)lock);
}

void dune_spin_lock(void *lock)
{
	spin_lock((spinlock_t *)lock);
}

bool dune_spin_trylock(void *lock)
{
	return spin_trylock((spinlock_t *)lock);
}

void dune_spin_unlock(void *lock)
{
	spin_unlock((spinlock_t *)lock);
}

unsigned long dune_spin_lock_irqsave(void *lock)
{
	unsigned long flags;

	spin_lock_irqsave((spinlock_t *)lock, flags);
	return flags;
}

void dune_spin_unlock_irqrestore(void *lock, unsigned long flags)
{
	spin_unlock_irqrestore((spinlock_t *)lock, flags);
}

void dune_owner_mutex_lock(void)
{
	mutex_lock(&dune_owner_mutex);
}

void dune_owner_mutex_unlock(void)
{
	mutex_unlock(&dune_owner_mutex);
}

/* CPUs. */

DEFINE_PER_CPU(unsigned int, dune_interrupts_asked);

struct dune_here dune_irq_disable(void)
{
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	local_irq_disable();
	return dune_here();
}

static void dune_nothing(struct irq_work *work)
{
}

static DEFINE_PER_CPU(struct irq_work, dune_interrupt) = IRQ_WORK_INIT_HARD(dune_nothing);

void dune_interrupt_soon(void)
{
	irq_work_queue(this_cpu_ptr(&dune_interrupt));
}

void dune_irq_enable(void)
{
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	local_irq_enable();
}

void dune_preempt_disable(void)
{
	preempt_disable();
}

void dune_preempt_enable(void)
{
	preempt_enable();
}

unsigned int dune_cpu(void)
{
	return raw_smp_processor_id();
}

unsigned int dune_nr_cpu_ids(void)
{
	return nr_cpu_ids;
}

bool dune_cpu_has_itlb_multihit(void)
{
	return boot_cpu_has_bug(X86_BUG_ITLB_MULTIHIT);
}

bool dune_cpu_has_fsgsbase(void)
{
	return boot_cpu_has(X86_FEATURE_FSGSBASE);
}

bool dune_cpu_has_enqcmd(void)
{
	return boot_cpu_has(X86_FEATURE_ENQCMD);
}

bool dune_cpu_has_fred(void)
{
#ifdef X86_FEATURE_FRED
	return cpu_feature_enabled(X86_FEATURE_FRED);
#else
	return false;
#endif
}

void dune_call_on(unsigned int cpu, void (*f)(void *), void *arg)
{
	DUNE_HEAVY(DUNE_HEAVY_IPI);
	smp_call_function_single(cpu, f, arg, 1);
}

int dune_cpuhp_setup(const char *name, int (*up)(unsigned int), int (*down)(unsigned int))
{
	return cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, name, up, down);
}

void dune_cpuhp_remove(int state)
{
	cpuhp_remove_state(state);
}

void dune_on_each_cpu(void (*f)(void *))
{
	DUNE_HEAVY(DUNE_HEAVY_IPI);
	on_each_cpu(f, NULL, 1);
}

static void (*dune_later_function)(void);

static void dune_later_now(struct work_struct *work)
{
	dune_later_function();
}

static DECLARE_DELAYED_WORK(dune_later_work, dune_later_now);

void dune_later(void (*f)(void), unsigned int ms)
{
	dune_later_function = f;
	schedule_delayed_work(&dune_later_work, msecs_to_jiffies(ms));
}

void dune_later_cancel(void)
{
	cancel_delayed_work_sync(&dune_later_work);
}

void dune_sleep_ms(unsigned int ms)
{
	msleep_interruptible(ms);
}

/* Suspend, resume and reboot of the machine; what the callbacks take depends on the kernel (Kbuild looks). */

#ifdef DUNE_SYSCORE_HAS_DATA
#define DUNE_SYSCORE_ARGUMENT void *data
#else
#define DUNE_SYSCORE_ARGUMENT void
#endif

static struct {
	int (*suspend)(void);
	void (*resume)(void);
	void (*shutdown)(void);
} dune_power;

static int dune_syscore_suspend(DUNE_SYSCORE_ARGUMENT)
{
	return dune_power.suspend();
}

static void dune_syscore_resume(DUNE_SYSCORE_ARGUMENT)
{
	dune_power.resume();
}

static void dune_syscore_shutdown(DUNE_SYSCORE_ARGUMENT)
{
	dune_power.shutdown();
}

#ifdef DUNE_SYSCORE_HAS_DATA
static const struct syscore_ops dune_syscore_ops = {
	.suspend = dune_syscore_suspend,
	.resume = dune_syscore_resume,
	.shutdown = dune_syscore_shutdown,
};
static struct syscore dune_syscore = { .ops = &dune_syscore_ops };
#else
static struct syscore_ops dune_syscore = {
	.suspend = dune_syscore_suspend,
	.resume = dune_syscore_resume,
	.shutdown = dune_syscore_shutdown,
};
#define register_syscore register_syscore_ops
#define unregister_syscore unregister_syscore_ops
#endif

void dune_power_register(int (*suspend)(void), void (*resume)(void), void (*shutdown)(void))
{
	dune_power.suspend = suspend;
	dune_power.resume = resume;
	dune_power.shutdown = shutdown;
	register_syscore(&dune_syscore);
}

void dune_power_unregister(void)
{
	unregister_syscore(&dune_syscore);
}

/* Memory. */

unsigned long dune_get_zeroed_page(void)
{
	return get_zeroed_page(GFP_KERNEL_ACCOUNT);
}

void dune_free_page(unsigned long addr)
{
	free_page(addr);
}

void *dune_kvzalloc(size_t bytes)
{
	return kvzalloc(bytes, GFP_KERNEL_ACCOUNT);
}

void dune_kvfree(const void *p)
{
	kvfree(p);
}

/* `private` of a page that nobody else knows is free for its owner. */
void dune_page_set_link(unsigned long addr, unsigned long link)
{
	set_page_private(virt_to_page((void *)addr), link);
}

unsigned long dune_page_link(unsigned long addr)
{
	return page_private(virt_to_page((void *)addr));
}

struct page *dune_virt_to_page(const void *addr)
{
	return virt_to_page(addr);
}

u64 dune_virt_to_phys(const void *addr)
{
	return __pa(addr);
}

void *dune_phys_to_virt(u64 pa)
{
	return __va(pa);
}

unsigned long dune_copy_from_user(void *to, const void __user *from, unsigned long n)
{
	return copy_from_user(to, from, n);
}

unsigned long dune_copy_from_user_now(void *to, const void __user *from, unsigned long n)
{
	return copy_from_user_nofault(to, from, n) ? n : 0;
}

unsigned long dune_copy_to_user(void __user *to, const void *from, unsigned long n)
{
	return copy_to_user(to, from, n);
}

/* The process and its mm. */

struct mm_struct *dune_current_mm(void)
{
	return current->mm;
}

void *dune_mm_pgd(struct mm_struct *mm)
{
	return mm->pgd;
}

bool dune_mmap_read_trylock(struct mm_struct *mm)
{
	return mmap_read_trylock(mm);
}

int dune_mmap_read_lock(struct mm_struct *mm)
{
	return mmap_read_lock_killable(mm);
}

int dune_mmap_write_lock(struct mm_struct *mm)
{
	return mmap_write_lock_killable(mm);
}

void dune_mmap_write_unlock(struct mm_struct *mm)
{
	mmap_write_unlock(mm);
}

void dune_mmap_read_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

struct vm_area_struct *dune_vma_at(struct mm_struct *mm, unsigned long addr)
{
	return vma_lookup(mm, addr);
}

unsigned long dune_vma_start(const struct vm_area_struct *vma)
{
	return vma->vm_start;
}

unsigned long dune_vma_pgoff(const struct vm_area_struct *vma)
{
	return vma->vm_pgoff;
}

unsigned long dune_vma_bytes(const struct vm_area_struct *vma)
{
	return vma->vm_end - vma->vm_start;
}

bool dune_vma_has_access(const struct vm_area_struct *vma, bool write)
{
	if (write)
		return vma->vm_flags & VM_WRITE;
	return vma->vm_flags & (VM_READ | VM_WRITE | VM_EXEC);
}

bool dune_vma_is_executable(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_EXEC;
}

bool dune_vma_is_userfaultfd(const struct vm_area_struct *vma)
{
	return userfaultfd_armed((struct vm_area_struct *)vma);
}

void dune_vma_set_run_page_flags(struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP);
}

bool dune_vma_is_shared(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_SHARED;
}

int dune_vma_insert_page(struct vm_area_struct *vma, struct page *page)
{
	return vm_insert_page(vma, vma->vm_start, page);
}

int dune_handle_mm_fault(struct vm_area_struct *vma, unsigned long addr, bool write, bool execute)
{
	/* Not FAULT_FLAG_USER: it would leave an OOM of the memory cgroup for the exception handler to settle. */
	unsigned int flags = FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_RETRY_NOWAIT;
	vm_fault_t ret;

	if (write)
		flags |= FAULT_FLAG_WRITE;
	if (execute)
		flags |= FAULT_FLAG_INSTRUCTION;
	ret = handle_mm_fault(vma, addr, flags, NULL);
	if (ret & VM_FAULT_COMPLETED)
		return DUNE_FAULT_DONE_UNLOCKED;
	return ret & (VM_FAULT_ERROR | VM_FAULT_RETRY) ? DUNE_FAULT_FAILED : DUNE_FAULT_DONE;
}

#ifdef DUNE_COUNT_OPS
unsigned long long dune_heavy[DUNE_HEAVY_KINDS];
#endif

/* The thread. */

struct task_struct *dune_current(void)
{
	return current;
}

struct dune_caller dune_caller(void)
{
	return (struct dune_caller){ current, current->mm };
}

struct task_struct *dune_get_current(void)
{
	return get_task_struct(current);
}

void dune_put_task(struct task_struct *task)
{
	put_task_struct(task);
}

/*
 * From 6.19 on a flag of its own tells that struct rseq is to be brought up to date, and only a way to user mode clears it. A
 * thread that a tracer stops there would never enter a guest, if that flag kept it: see dune_rseq_is_due.
 */
#if defined(CONFIG_RSEQ) && defined(TIF_RSEQ) && TIF_RSEQ != TIF_NOTIFY_RESUME
#define DUNE_HAS_TIF_RSEQ
#define DUNE_USER_MODE_WORK (EXIT_TO_USER_MODE_WORK & ~_TIF_RSEQ)
#else
#define DUNE_USER_MODE_WORK EXIT_TO_USER_MODE_WORK
#endif

#define DUNE_BEFORE_ENTRY (EXIT_TO_USER_MODE_WORK | _TIF_NEED_FPU_LOAD | _TIF_USER_RETURN_NOTIFY)

const unsigned long dune_flags_before_entry = DUNE_BEFORE_ENTRY;
const unsigned long dune_flag_cpuid_faults = _TIF_NOCPUID;
/* In a window: which notifiers there are was looked at before. */
const unsigned long dune_flags_before_settling = (DUNE_BEFORE_ENTRY & ~_TIF_USER_RETURN_NOTIFY) | _TIF_NOCPUID;
const unsigned long dune_flag_user_return = _TIF_USER_RETURN_NOTIFY;
/* Linux has looked already whether the thread has an I/O bitmap to load. */
const unsigned long dune_flags_before_shortcut = (DUNE_BEFORE_ENTRY & ~_TIF_USER_RETURN_NOTIFY) | _TIF_IO_BITMAP;

void dune_task_words(struct task_struct *task, struct dune_task_words *words)
{
	words->flags = &task_thread_info(task)->flags;
	words->nvcsw = &task->nvcsw;
	words->nivcsw = &task->nivcsw;
	words->regs = task_pt_regs(task);
}

bool dune_task_is_exiting(const struct task_struct *task)
{
	return READ_ONCE(task->flags) & PF_EXITING;
}

bool dune_task_has_mm(const struct task_struct *task, const struct mm_struct *mm)
{
	return READ_ONCE(task->mm) == mm;
}

/* The thread's struct rseq in user space, or 0. */
u64 dune_rseq(u32 *signature)
{
#ifdef CONFIG_RSEQ
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	*signature = current->rseq_sig;
	return (unsigned long)current->rseq;
#else
	*signature = current->rseq.sig;
	return (unsigned long)current->rseq.usrptr;
#endif
#else
	return 0;
#endif
}

/* Whether the thread was switched out since it was last in user mode, where Linux tells that by a flag of its own. */
bool dune_rseq_is_due(void)
{
#ifdef DUNE_HAS_TIF_RSEQ
	return test_thread_flag(TIF_RSEQ);
#else
	return false;
#endif
}

/* For version 2 of struct rseq Linux looks for a critical section of those only whom an interrupt took out of user mode. */
void dune_rseq_note_irq(void)
{
#ifdef DUNE_HAS_TIF_RSEQ
	rseq_note_user_irq_entry();
#endif
}

/* Whether what struct rseq tells of the CPU is true as it is. Interrupts are off. */
bool dune_rseq_is_true(void)
{
#ifdef DUNE_HAS_TIF_RSEQ
	return !current->rseq.usrptr || (current->rseq.ids.cpu_id == raw_smp_processor_id() &&
					 current->rseq.ids.mm_cid == task_mm_cid(current));
#else
	return true;
#endif
}

bool dune_signal_pending(void)
{
	return signal_pending(current);
}

bool dune_work_pending(void)
{
	return read_thread_flags() & DUNE_USER_MODE_WORK;
}

bool dune_user_work_pending(void)
{
	return read_thread_flags() & (DUNE_USER_MODE_WORK & ~_TIF_NEED_RESCHED);
}

/*
 * What Linux does for a thread on its way to user mode and, for KVM, on its way to a guest: task work, the limits'
 * throttling, the CPU's number in struct rseq. Sleeps. Before 6.18 the function wanted a vCPU of KVM's, in which it counts
 * signals: it gets one that nobody looks at.
 */
bool dune_do_user_work(void)
{
#ifdef DUNE_WORK_WANTS_VCPU
	static struct kvm_run run;
	static struct kvm_vcpu vcpu = { .run = &run };

	return !xfer_to_guest_mode_handle_work(&vcpu);
#else
	return !xfer_to_guest_mode_handle_work();
#endif
}

void dune_get_file(struct file *file)
{
	get_file(file);
}

/* Whether it is a read(2) into plain memory, in the thread that calls: no io_uring, no aio, nobody in the kernel. */
bool dune_plain_read(struct kiocb *iocb, struct iov_iter *to, struct file **file, u64 *buffer, u64 *count)
{
	if (!is_sync_kiocb(iocb) || !iter_is_ubuf(to))
		return false;
	*file = iocb->ki_filp;
	*buffer = (u64)to->ubuf + to->iov_offset;
	*count = iov_iter_count(to);
	return true;
}

void dune_cond_resched(void)
{
	if (need_resched())
		schedule();
}

void dune_yield(void)
{
	yield();
}

/* A process of a user namespace counts as the user who made the outermost one. */
u32 dune_charged_uid(void)
{
	const struct user_namespace *ns = current_user_ns();

	if (ns == &init_user_ns)
		return __kuid_val(current_uid());
	while (ns->parent && ns->parent != &init_user_ns)
		ns = ns->parent;
	return __kuid_val(ns->owner);
}

bool dune_may_exceed(void)
{
	return capable(CAP_SYS_RESOURCE);
}

void dune_wait_until_zero(const unsigned long *count)
{
	while (READ_ONCE(*count))
		msleep(1);
	/* Whoever counted down may still be on its way out of the module; callbacks run with bottom halves off. */
	synchronize_rcu();
}

void *dune_file_private(const struct file *file)
{
	return file->private_data;
}

void dune_file_set_private(struct file *file, void *data)
{
	file->private_data = data;
}

/* CPU state of the host. */

unsigned long dune_read_cr0(void)
{
	return read_cr0();
}

void dune_cr4_set_vmxe(void)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	DUNE_HEAVY(DUNE_HEAVY_LOAD);
	cr4_set_bits(X86_CR4_VMXE);
#endif
}

void dune_cr4_clear_vmxe(void)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	DUNE_HEAVY(DUNE_HEAVY_LOAD);
	cr4_clear_bits(X86_CR4_VMXE);
#endif
}

unsigned long dune_fs_base(void)
{
	return current->thread.fsbase;
}

unsigned long dune_percpu_base(void)
{
	unsigned long base;

	DUNE_HEAVY(DUNE_HEAVY_RDMSR);
	rdmsrq(MSR_GS_BASE, base);
	return base;
}

unsigned long dune_tss_base(void)
{
	return (unsigned long)&get_cpu_entry_area(raw_smp_processor_id())->tss.x86_tss;
}

static noinline __cold void dune_reload_tss_limit(void)
{
	struct desc_struct *gdt = get_current_gdt_rw();
	struct desc_ptr writable = { .size = GDT_SIZE - 1, .address = (unsigned long)gdt };
	struct desc_ptr loaded;
	tss_desc tss;

	memcpy(&tss, &gdt[GDT_ENTRY_TSS], sizeof(tss));
	tss.type = DESC_TSS;
	write_gdt_entry(gdt, GDT_ENTRY_TSS, &tss, DESC_TSS);
	/* LTR marks it busy, which the table that is loaded otherwise does not let it. */
	native_store_gdt(&loaded);
	DUNE_HEAVY(DUNE_HEAVY_LOAD);
	native_load_gdt(&writable);
	DUNE_HEAVY(DUNE_HEAVY_LOAD);
	asm volatile("ltr %w0" : : "q" (GDT_ENTRY_TSS * 8));
	DUNE_HEAVY(DUNE_HEAVY_LOAD);
	native_load_gdt(&loaded);
	this_cpu_write(__tss_limit_invalid, false);
}

/* Puts back what a VM exit left wrong: TR's limit, of which only a thread with ports is told, and DR7. */
static __always_inline void dune_put_back(void)
{
	unsigned long dr7;

	/* Else what invalidate_tss_limit() comes to where nothing is to be done at once. */
	if (unlikely(test_thread_flag(TIF_IO_BITMAP)))
		dune_reload_tss_limit();
	else
		this_cpu_write(__tss_limit_invalid, true);
	dr7 = __this_cpu_read(cpu_dr7);
	if (unlikely(dr7)) {
		DUNE_HEAVY(DUNE_HEAVY_LOAD);
		set_debugreg(dr7, 7);
	}
}

void dune_after_exit(void)
{
	dune_put_back();
}

/* All that is left to do after an exit that was no interrupt's: dune_after_exit, dune_guest_timing_exit, dune_irq_enable. */
void dune_window_end(void)
{
	dune_put_back();
	guest_timing_exit_irqoff();
	DUNE_HEAVY(DUNE_HEAVY_INTERRUPT_FLAG);
	local_irq_enable();
}

/* The same, but that interrupts stay off. */
void dune_window_end_off(void)
{
	dune_put_back();
	guest_timing_exit_irqoff();
}

int dune_rdmsr_safe(u32 msr, u64 *value)
{
	DUNE_HEAVY(DUNE_HEAVY_RDMSR);
	return rdmsrq_safe(msr, value);
}

u64 dune_xcr0(void)
{
	return boot_cpu_has(X86_FEATURE_OSXSAVE) ? xgetbv(XCR_XFEATURE_ENABLED_MASK) : 0;
}

/* From 6.19 on only KVM may turn VMX on. */
bool dune_may_own_vmx(void)
{
	return LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0);
}

void dune_vmx_emergency_register(void (*off)(void))
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	cpu_emergency_register_virt_callback(off);
#endif
}

void dune_vmx_emergency_unregister(void (*off)(void))
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	cpu_emergency_unregister_virt_callback(off);
#endif
}

void dune_intel_pt_vmx(bool on)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	intel_pt_handle_vmx(on);
#endif
}

/* The device node. */

static const struct class dune_class = { .name = "dune" };
static int dune_major;

int dune_chrdev_register(const struct file_operations *fops)
{
	struct device *dev;
	int ret;

	ret = class_register(&dune_class);
	if (ret)
		return ret;
	dune_major = register_chrdev(0, "dune", fops);
	if (dune_major < 0) {
		class_unregister(&dune_class);
		return dune_major;
	}
	dev = device_create(&dune_class, NULL, MKDEV(dune_major, 0), NULL, "dune");
	if (IS_ERR(dev)) {
		unregister_chrdev(dune_major, "dune");
		class_unregister(&dune_class);
		return PTR_ERR(dev);
	}
	return 0;
}

void dune_chrdev_unregister(void)
{
	device_destroy(&dune_class, MKDEV(dune_major, 0));
	unregister_chrdev(dune_major, "dune");
	class_unregister(&dune_class);
}

/* debugfs. */

void *dune_debugfs_create_dir(const char *name, void *parent)
{
	return debugfs_create_dir(name, parent);
}

void dune_debugfs_create_ulong(const char *name, void *dir, unsigned long *value)
{
	debugfs_create_ulong(name, 0444, dir, value);
}

void dune_debugfs_remove(void *dir)
{
	debugfs_remove(dir);
}

typedef int dune_show_fn(struct seq_file *to);

static int dune_text_show(struct seq_file *to, void *unused)
{
	dune_show_fn *show = to->private;

	return show(to);
}

static int dune_text_open(struct inode *inode, struct file *file)
{
	return single_open(file, dune_text_show, inode->i_private);
}

static const struct file_operations dune_text_fops = {
	.owner = THIS_MODULE,
	.open = dune_text_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = single_release,
};

void dune_debugfs_create_text(const char *name, void *dir, dune_show_fn *show)
{
	debugfs_create_file(name, 0400, dir, show, &dune_text_fops);
}

void dune_seq_text(struct seq_file *to, const char *text)
{
	seq_puts(to, text);
}

void dune_seq_named(struct seq_file *to, const char *name, u64 value)
{
	seq_printf(to, "dune-%s:\t%llu\n", name, value);
}

void dune_seq_exits(struct seq_file *to, u32 reason, u64 value)
{
	seq_printf(to, "dune-exits-%u:\t%llu\n", reason, value);
}

void dune_seq_number(struct seq_file *to, u64 value)
{
	seq_printf(to, "%llu ", value);
}

void dune_seq_words(struct seq_file *to, const char *words, unsigned int bytes)
{
	seq_write(to, words, bytes);
}

void dune_seq_hex(struct seq_file *to, unsigned int digits, u64 value)
{
	seq_printf(to, " 0x%0*llx\n", digits, value);
}

bool dune_seq_may_see_addresses(struct seq_file *to)
{
	return file_ns_capable(to->file, &init_user_ns, CAP_SYSLOG);
}

int dune_current_pid(void)
{
	return task_tgid_nr(current);
}

/* The guest. */

void dune_guest_timing_enter(void)
{
	guest_timing_enter_irqoff();
}

void dune_guest_timing_exit(void)
{
	guest_timing_exit_irqoff();
}

/*
 * noinstr: while the guest runs, RCU does not watch and lockdep believes that interrupts are on.
 *
 * As guest_state_enter_irqoff() and guest_state_exit_irqoff() around the entry, but that RCU is told once per tick and, by
 * dune_rcu_note(), when an interrupt ended the guest: what it wants to know is that this CPU gets to a quiescent state
 * time and again, and nothing looks at the answer more often.
 */
static __always_inline void dune_state_enter(struct dune_entry *entry, bool note)
{
	instrumentation_begin();
	trace_hardirqs_on_prepare();
	lockdep_hardirqs_on_prepare();
	instrumentation_end();
	if (!context_tracking_guest_enter() && note) {
		instrumentation_begin();
		entry->noted = jiffies;
		rcu_virt_note_context_switch();
		instrumentation_end();
	}
	lockdep_hardirqs_on(CALLER_ADDR0);
}

static __always_inline void dune_state_exit(void)
{
	lockdep_hardirqs_off(CALLER_ADDR0);
	context_tracking_guest_exit();
	instrumentation_begin();
	trace_hardirqs_off_finish();
	instrumentation_end();
}

/* Where RCU was told in this tick, and no L1 data cache is ever flushed. */
noinstr unsigned long dune_guest_enter(void *run_page, struct dune_entry *entry)
{
	unsigned long ret;

	dune_state_enter(entry, false);
	ret = dune_vmenter(run_page, entry);
	dune_state_exit();
	return ret;
}

/* `host_ran`: see dune_l1tf_before_entry. */
noinstr unsigned long dune_guest_enter_slowly(void *run_page, struct dune_entry *entry, bool host_ran)
{
	unsigned long ret;

	dune_state_enter(entry, entry->noted != jiffies);
	if (dune_l1d_flushes)
		dune_l1tf_before_entry(host_ran);
	ret = dune_vmenter(run_page, entry);
	dune_state_exit();
	return ret;
}

/* Tells RCU that a guest ran on this CPU until now. With interrupts off. */
void dune_rcu_note(void)
{
	rcu_virt_note_context_switch();
}

void dune_nmi(void)
{
	/* The exit consumed the NMI and left NMIs blocked: run the host's handler, whose IRET unblocks them. */
	asm volatile("int $2");
}

void dune_machine_check(void)
{
#ifdef CONFIG_X86_MCE
	struct pt_regs regs = {
		.cs = 3,	/* as if user mode were interrupted: the guest is a user process */
		.flags = X86_EFLAGS_IF,
	};

	do_machine_check(&regs);
#endif
}

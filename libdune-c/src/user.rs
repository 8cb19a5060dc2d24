// SPDX-License-Identifier: MIT OR Apache-2.0

//! Code at CPL3: going there, its system calls and exceptions, coming back.
//!
//! A *visit* is a call of dune_jump_to_user that has not returned. Visits of a thread nest: a handler may begin another,
//! and dune_ret_from_user ends the last one.
//!
//! # Safety
//!
//! Assembly keeps the registers that a C function must keep when a visit begins, and dune_ret_from_user loads them: what
//! lies on the stack above is left as longjmp would leave it. Between there are only frames of the visit's loop, which own
//! nothing, and of the program.

use core::arch::asm;
use core::arch::global_asm;
use core::cell::Cell;
use core::ffi::c_int;
use core::ffi::c_ulong;
use core::mem;
use core::ptr;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Release;

use libdune::user::PageFault;
use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::user::UserRegisters;
use libdune::Dune;
use libdune::Gva;
use libdune::Thread;
use libdune::Vector;

use crate::entry::shared;
use crate::frame::dune_tf;
use crate::frame::FLAGS_CPL0;
use crate::frame::GD_KD;
use crate::frame::GD_KT;
use crate::out::die;
use crate::trap;

/// A handler of system calls of CPL3.
pub type dune_syscall_cb = Option<unsafe extern "C" fn(tf: *mut dune_tf)>;

static SYSTEM_CALL: AtomicUsize = AtomicUsize::new(0);

/// What assembly keeps of the caller of a visit.
#[repr(C)]
struct Kept([u64; 7]);

/// A call of dune_jump_to_user.
#[repr(C)]
struct Visit {
    kept: Kept,
    context: *mut UserContext,
    /// The one that it began in.
    outer: *mut Visit,
}

thread_local! {
    /// The visit that was begun last.
    static VISIT: Cell<*mut Visit> = const { Cell::new(ptr::null_mut()) };
    /// FS base with which the next visit begins, if it was set.
    static USER_FS: Cell<Option<u64>> = const { Cell::new(None) };
}

#[allow(improper_ctypes)] // Assembly passes the pointer on.
extern "C" {
    fn dune_c_visit(kept: *mut Kept, run: unsafe extern "C" fn(*mut Visit) -> !, visit: *mut Visit) -> c_int;
    fn dune_c_again(kept: *const Kept, run: unsafe extern "C" fn(*mut Visit) -> !, visit: *mut Visit) -> !;
    fn dune_c_return(kept: *const Kept, result: c_int) -> !;
    fn dune_c_load(tf: *const dune_tf) -> !;
}

global_asm!(
    ".pushsection .text.dune_c_user, \"ax\", @progbits",
    ".hidden dune_c_visit",
    ".globl dune_c_visit",
    "dune_c_visit:",
    "mov [rdi], rbx",
    "mov [rdi + 8], rbp",
    "mov [rdi + 16], r12",
    "mov [rdi + 24], r13",
    "mov [rdi + 32], r14",
    "mov [rdi + 40], r15",
    "mov [rdi + 48], rsp",
    // The same anew, from deeper on the stack.
    ".hidden dune_c_again",
    ".globl dune_c_again",
    "dune_c_again:",
    "mov rsp, [rdi + 48]",
    "mov rdi, rdx",
    "sub rsp, 8",
    "call rsi",
    "ud2",
    ".hidden dune_c_return",
    ".globl dune_c_return",
    "dune_c_return:",
    "mov rbx, [rdi]",
    "mov rbp, [rdi + 8]",
    "mov r12, [rdi + 16]",
    "mov r13, [rdi + 24]",
    "mov r14, [rdi + 32]",
    "mov r15, [rdi + 40]",
    "mov rsp, [rdi + 48]",
    "mov eax, esi",
    "ret",
    // A frame of CPL0, whose last words are what IRETQ takes.
    ".hidden dune_c_load",
    ".globl dune_c_load",
    "dune_c_load:",
    "mov rsp, rdi",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop r8",
    "pop r9",
    "pop r10",
    "pop r11",
    "pop rbx",
    "pop rbp",
    "pop r12",
    "pop r13",
    "pop r14",
    "pop r15",
    "pop rax",
    "add rsp, 8",
    "iretq",
    ".popsection",
);

/// Calls `cb` for system calls of CPL3, on every Dune thread.
#[no_mangle]
pub extern "C" fn dune_register_syscall_handler(cb: dune_syscall_cb) {
    SYSTEM_CALL.store(cb.map_or(0, |cb| cb as usize), Release);
}

/// FS base that CPL3 has: of the visit, or that the next one begins with, which is the thread's own until it is set.
#[no_mangle]
pub extern "C" fn dune_get_user_fs() -> c_ulong {
    // SAFETY: A visit of this thread, which is not at CPL3 now.
    if let Some(visit) = unsafe { VISIT.get().as_ref() } {
        // SAFETY: As above.
        return unsafe { (*visit.context).registers().fs_base };
    }
    USER_FS.get().unwrap_or_else(own_fs)
}

/// Sets that.
#[no_mangle]
pub extern "C" fn dune_set_user_fs(fs_base: c_ulong) {
    USER_FS.set(Some(fs_base));
    // SAFETY: A visit of this thread, which is not at CPL3 now.
    unsafe {
        if let Some(visit) = VISIT.get().as_ref() {
            (*visit.context).registers_mut().fs_base = fs_base;
        }
    }
}

/// The thread's own FS base: where a thread's control block is, its own address stands (psABI, "Thread-Local Storage").
fn own_fs() -> u64 {
    let base: u64;
    // SAFETY: Reads the first word of the control block.
    unsafe { asm!("mov {}, fs:[0]", out(reg) base, options(nostack, preserves_flags, readonly)) };
    base
}

/// Goes on at CPL3 with the registers of `tf`, whose selectors become CPL3's: dune_pop_trap_frame of the same frame goes there,
/// too. Returns what is given to dune_ret_from_user, or -EINVAL outside Dune mode.
#[no_mangle]
pub unsafe extern "C" fn dune_jump_to_user(tf: *mut dune_tf) -> c_int {
    // SAFETY: The caller's frame.
    let frame = unsafe {
        let mut frame = tf.read_unaligned();
        frame.make_cpl3();
        tf.write_unaligned(frame);
        frame
    };
    begin(&frame).unwrap_or(-libc::EINVAL)
}

fn begin(tf: &dune_tf) -> Option<c_int> {
    // SAFETY: The callers do not keep it.
    let thread = unsafe { shared().ok()?.thread()? };
    let mut context = Box::new(UserContext::new(&thread));
    tf.load(&mut context);
    context.registers_mut().fs_base = dune_get_user_fs();
    let context = Box::into_raw(context);
    let mut visit = Visit {
        kept: Kept([0; 7]),
        context,
        outer: VISIT.get(),
    };
    let visit = &raw mut visit;
    VISIT.set(visit);
    // SAFETY: The visit stays on this stack until it ends, and comes back here then.
    unsafe {
        let result = dune_c_visit(&raw mut (*visit).kept, run, visit);
        drop(Box::from_raw(context));
        Some(result)
    }
}

/// Ends the last visit: its dune_jump_to_user returns `ret`.
#[no_mangle]
pub extern "C" fn dune_ret_from_user(ret: c_int) -> ! {
    let visit = VISIT.get();
    if visit.is_null() {
        die(format_args!("dune_ret_from_user without dune_jump_to_user"));
    }
    // SAFETY: Its caller's frame is there until this. See above for the frames in between.
    unsafe {
        VISIT.set((*visit).outer);
        dune_c_return(&raw const (*visit).kept, ret)
    }
}

/// Goes on with the registers of a frame, at CPL0 or CPL3 as its CS says, and does not come back. Exceptions and system
/// calls of CPL3 come to the handlers as in a visit.
#[no_mangle]
pub unsafe extern "C" fn dune_pop_trap_frame(tf: *mut dune_tf) {
    // SAFETY: The caller's frame.
    unsafe { pop(tf.read_unaligned()) }
}

/// # Safety
///
/// What is on the stack above is not used any more.
pub(crate) unsafe fn pop(mut tf: dune_tf) -> ! {
    if !tf.is_cpl3() {
        tf.rflags |= FLAGS_CPL0;
        (tf.cs, tf.ss) = (GD_KT, GD_KD);
        // SAFETY: The caller's frame is one of CPL0 to go on with. Its copy is on the stack that is left.
        unsafe { dune_c_load(&raw const tf) }
    }
    // SAFETY: As for dune_ret_from_user: the loop of the visit begins anew.
    unsafe {
        let visit = VISIT.get();
        if !visit.is_null() {
            tf.load(&mut *(*visit).context);
            dune_c_again(&raw const (*visit).kept, run, visit);
        }
    }
    match begin(&tf) {
        Some(_) => die(format_args!("nowhere to return to from a frame of dune_pop_trap_frame")),
        None => die(format_args!("dune_pop_trap_frame to CPL3 outside Dune mode")),
    }
}

/// Runs a visit until dune_ret_from_user.
unsafe extern "C" fn run(visit: *mut Visit) -> ! {
    let mut refused = Refused::default();
    loop {
        // SAFETY: The visit owns its context, and no handler of the program runs now.
        let (context, thread) = unsafe { (&mut *(*visit).context, current_thread()) };
        match context.run(&thread) {
            UserExit::Syscall => {
                let mut tf = dune_tf::of_user(context, 0);
                tf.rcx = tf.r10;
                call_system(&mut tf);
                tf.r10 = tf.rcx;
                // As SYSCALL leaves it.
                tf.rcx = tf.rip;
                tf.load(context);
            }
            UserExit::Int80 => exception(context, Vector(0x80), 0, 0),
            UserExit::Exception { vector, error_code } => exception(context, vector, 0, error_code),
            UserExit::PageFault(fault) if fill(&thread, &fault) => {}
            UserExit::PageFault(fault) => {
                if fault.host_refused() && refused.is_hopeless(context, &fault, &thread) {
                    let rip = context.registers().rip;
                    die(format_args!(
                        "{fault:?} of CPL3 at RIP {rip:#x}, again and again: Linux does not allow it, whatever the page table says"
                    ));
                }
                exception(context, Vector::PF, fault.address, fault.error_code);
            }
            exit => die(format_args!("CPL3 ended with {exit:?}")),
        }
    }
}

/// The last access of a visit that the process may not make, and that its handler took.
#[derive(Default)]
struct Refused {
    access: Option<(UserRegisters, PageFault)>,
    /// System calls of the thread then.
    calls: u64,
    times: u32,
}

impl Refused {
    /// Whether nothing was done since the same one, again and again.
    fn is_hopeless(&mut self, context: &UserContext, fault: &PageFault, thread: &Thread<'_>) -> bool {
        let access = Some((*context.registers(), *fault));
        let calls = trap::calls(thread);
        let is_same = self.access == access && self.calls == calls;
        let times = if is_same { self.times + 1 } else { 0 };
        *self = Self { access, calls, times };
        times > trap::PATIENCE
    }
}

fn current_thread() -> Thread<'static> {
    // SAFETY: Not kept.
    match shared().ok().and_then(|shared| unsafe { shared.thread() }) {
        Some(thread) => thread,
        None => die(format_args!(
            "the thread is not in Dune mode any more, and has code at CPL3"
        )),
    }
}

fn call_system(tf: &mut dune_tf) {
    let handler = SYSTEM_CALL.load(Acquire);
    if handler == 0 {
        let rax = tf.rax;
        die(format_args!("system call {rax} of CPL3, and no handler is registered"));
    }
    // SAFETY: Of this type by its registration.
    unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut dune_tf)>(handler)(tf) };
}

fn exception(context: &mut UserContext, vector: Vector, address: u64, error_code: u64) {
    let mut tf = dune_tf::of_user(context, error_code as u32);
    if !trap::call(vector, &mut tf, address, error_code) {
        let rip = tf.rip;
        die(format_args!(
            "{vector} of CPL3 at RIP {rip:#x} (error code {error_code:#x}, address {address:#x}), and no handler is registered"
        ));
    }
    tf.load(context);
}

/// Fills a GiB in that was not used before.
fn fill(thread: &Thread<'_>, fault: &PageFault) -> bool {
    if fault.is_present() || fault.host_refused() {
        return false;
    }
    // SAFETY: Nothing loads another table meanwhile.
    let fill = |gva| unsafe { thread.loaded_space() }.fill(gva).unwrap_or(false);
    Gva::new(fault.address).is_some_and(fill)
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

/// Makes the system call of a frame, on behalf of the program; the result, or the negative errno, goes to RAX. Pointers
/// are those of the process. A child of fork goes on as its parent; new threads and rt_sigreturn get ENOSYS, and
/// arch_prctl is about the segments of CPL3.
#[no_mangle]
pub unsafe extern "C" fn dune_passthrough_syscall(tf: *mut dune_tf) {
    // SAFETY: The caller's frame.
    unsafe {
        let mut frame = tf.read_unaligned();
        frame.rax = pass(&frame) as u64;
        tf.write_unaligned(frame);
    }
}

fn pass(tf: &dune_tf) -> i64 {
    let enosys = -i64::from(libc::ENOSYS);
    let mut number = tf.rax as i64;
    match number {
        libc::SYS_arch_prctl => {
            if let Some(result) = set_segment(tf.rdi, tf.rsi) {
                return result;
            }
        }
        // The child would return from this function on its parent's stack.
        libc::SYS_vfork => number = libc::SYS_fork,
        libc::SYS_clone if tf.rsi != 0 || tf.rdi & libc::CLONE_VM as u64 != 0 => return enosys,
        libc::SYS_clone3 | libc::SYS_rt_sigreturn => return enosys,
        _ => {}
    }
    let result: i64;
    // SAFETY: What the program passes on it answers for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") tf.rdi,
            in("rsi") tf.rsi,
            in("rdx") tf.rdx,
            in("r10") tf.rcx,
            in("r8") tf.r8,
            in("r9") tf.r9,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// arch_prctl of code at CPL3; `None` where it is none, or not about FS and GS.
fn set_segment(code: u64, value: u64) -> Option<i64> {
    let visit = VISIT.get();
    if visit.is_null() || !Dune::is_active() {
        return None;
    }
    // SAFETY: A visit of this thread, which is not at CPL3 now. A pointer of CPL3 is the program's to pass on.
    unsafe {
        let registers = (*(*visit).context).registers_mut();
        match code {
            ARCH_SET_FS => registers.fs_base = value,
            ARCH_SET_GS => registers.gs_base = value,
            ARCH_GET_FS => (value as *mut u64).write_unaligned(registers.fs_base),
            ARCH_GET_GS => (value as *mut u64).write_unaligned(registers.gs_base),
            _ => return None,
        }
    }
    Some(0)
}

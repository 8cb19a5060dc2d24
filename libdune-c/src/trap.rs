// SPDX-License-Identifier: MIT OR Apache-2.0

//! Handlers of exceptions at CPL0: one table for the process, in which every Dune thread looks.
//!
//! # Safety
//!
//! The tables hold functions of the program, of the types of their registration.

use core::cell::UnsafeCell;
use core::ffi::c_int;
use core::mem;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Acquire;
use core::sync::atomic::Ordering::Release;

use libdune::abi::PAGE_FAULT_HOST_REFUSED;
use libdune::Outcome;
use libdune::Thread;
use libdune::TrapFrame;
use libdune::Vector;

use crate::frame::dune_tf;
use crate::user::pop;

/// A handler of an exception or signal.
pub type dune_intr_cb = Option<unsafe extern "C" fn(tf: *mut dune_tf)>;
/// A handler of page faults; `fec` is the CPU's error code (FEC_*).
pub type dune_pgflt_cb = Option<unsafe extern "C" fn(addr: usize, fec: u64, tf: *mut dune_tf)>;

const VECTORS: usize = 256;

static INTERRUPTS: [AtomicUsize; VECTORS] = [const { AtomicUsize::new(0) }; VECTORS];
static PAGE_FAULT: AtomicUsize = AtomicUsize::new(0);

/// Calls `cb` for exceptions with this vector, at CPL0 and CPL3, on every Dune thread; NULL: for none.
///
/// 0, or -EINVAL.
#[no_mangle]
pub extern "C" fn dune_register_intr_handler(vec: c_int, cb: dune_intr_cb) -> c_int {
    let Some(slot) = usize::try_from(vec).ok().and_then(|vec| INTERRUPTS.get(vec)) else {
        return -libc::EINVAL;
    };
    slot.store(cb.map_or(0, |cb| cb as usize), Release);
    0
}

/// Calls `cb` for page faults that have no handler of their vector, at CPL0 and CPL3, on every Dune thread. An access that
/// the process may not make, whatever the page table says, comes there as one to what is not mapped; where it comes again and
/// again at once, because the handler cannot mend that, it becomes Linux' signal.
#[no_mangle]
pub extern "C" fn dune_register_pgflt_handler(cb: dune_pgflt_cb) {
    PAGE_FAULT.store(cb.map_or(0, |cb| cb as usize), Release);
}

/// Has the calling thread, and those that it makes, look in the tables.
pub(crate) fn install(thread: &Thread<'_>) {
    for vector in 0..VECTORS {
        thread.set_exception_handler(Vector(vector as u8), handle);
    }
}

/// Calls the program's handler, if there is one. What it gets is the CPU's error code: memory that the process has not is as
/// little present as what a page table has not.
pub(crate) fn call(vector: Vector, tf: &mut dune_tf, address: u64, error_code: u64) -> bool {
    let error_code = error_code & !PAGE_FAULT_HOST_REFUSED;
    let handler = INTERRUPTS[usize::from(vector.0)].load(Acquire);
    if handler != 0 {
        // SAFETY: Of this type by its registration.
        unsafe { mem::transmute::<usize, unsafe extern "C" fn(*mut dune_tf)>(handler)(tf) };
        return true;
    }
    let handler = PAGE_FAULT.load(Acquire);
    if vector == Vector::PF && handler != 0 {
        // SAFETY: As above.
        let handler = unsafe { mem::transmute::<usize, unsafe extern "C" fn(usize, u64, *mut dune_tf)>(handler) };
        // SAFETY: The program's.
        unsafe { handler(address as usize, error_code, tf) };
        return true;
    }
    false
}

fn handle(frame: &mut TrapFrame, thread: &Thread<'_>) -> Outcome {
    let refused = frame.host_refused().then_some(*frame);
    if refused.is_some_and(|refused| is_hopeless(&refused, thread)) {
        return Outcome::Unhandled;
    }
    let mut tf = dune_tf::of_trap(frame);
    if !call(frame.vector(), &mut tf, frame.cr2, frame.error_code) {
        return Outcome::Unhandled;
    }
    if tf.is_cpl3() && !frame.is_cpl3() {
        // SAFETY: What the handler's stack holds is left there.
        unsafe { pop(tf) };
    }
    tf.store(frame);
    if let Some(refused) = refused {
        note(&refused, thread);
    }
    Outcome::Resume
}

/// How often the same access is refused with nothing done in between before the handler is not asked any more.
pub(crate) const PATIENCE: u32 = 16;

/// The last access of a thread that the host refused and its handler took.
#[derive(Clone, Copy)]
struct Refused {
    frame: Option<TrapFrame>,
    /// System calls of the thread behind the handler.
    calls: u64,
    times: u32,
}

/// By the number of the vCPU.
struct Table([UnsafeCell<Refused>; 1024]);

// SAFETY: An element is used by the handler of one thread at a time, or by one that interrupted it.
unsafe impl Sync for Table {}

static REFUSED: Table = Table(
    [const {
        UnsafeCell::new(Refused {
            frame: None,
            calls: 0,
            times: 0,
        })
    }; 1024],
);

fn refused(thread: &Thread<'_>) -> *mut Refused {
    let table = &REFUSED.0;
    table[thread.vcpu() as usize % table.len()].get()
}

/// How many system calls the thread has made.
pub(crate) fn calls(thread: &Thread<'_>) -> u64 {
    /// Number of the exit by which they are made.
    const VMCALL: usize = 18;
    thread.counters().exits[VMCALL]
}

/// Whether the thread has done nothing since its handler took this access, again and again.
fn is_hopeless(frame: &TrapFrame, thread: &Thread<'_>) -> bool {
    // SAFETY: See `Table`.
    let last = unsafe { refused(thread).read() };
    last.frame.as_ref() == Some(frame) && last.calls == calls(thread) && last.times >= PATIENCE
}

/// Notes that the handler took it.
fn note(frame: &TrapFrame, thread: &Thread<'_>) {
    // SAFETY: See `Table`.
    unsafe {
        let last = refused(thread);
        let again = (*last).frame.as_ref() == Some(frame);
        last.write(Refused {
            frame: Some(*frame),
            calls: calls(thread),
            times: if again { (*last).times + 1 } else { 0 },
        });
    }
}

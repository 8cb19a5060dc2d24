// SPDX-License-Identifier: GPL-2.0

//! The VMCS of the last entry that failed, for `last_failed_entry` in debugfs.
//!
//! A file and not the kernel's log: any user of the device can have entries fail, as often as it likes, and the host's part of
//! a VMCS tells where the kernel lies. The file is root's, and that part is for readers with CAP_SYSLOG.

use super::vmcs::CurrentVmcs;
use crate::arch::exit::ExitReason;
use crate::arch::vmcs_field::exit_info;
use crate::arch::vmcs_field::FIELDS;
use crate::sys::debugfs::Show;
use crate::sys::lock::Class;
use crate::sys::lock::SpinLock;
use crate::sys::seq::Seq;
use crate::sys::thread;

/// What was read of a VMCS, and whose it was.
struct Record {
    /// Entries that failed since the module was loaded, and were recorded.
    failures: u64,
    pid: u32,
    space: u64,
    /// The CPU exited for the failure; else VMLAUNCH or VMRESUME told it.
    by_exit: bool,
    /// By field; `None`: this CPU has no such field.
    values: [Option<u64>; FIELDS.len()],
}

static LAST: SpinLock<Record> = SpinLock::new(Record {
    failures: 0,
    pid: 0,
    space: 0,
    by_exit: false,
    values: [None; FIELDS.len()],
});

/// To be called once, before any guest runs.
pub(crate) fn init() {
    // SAFETY: A static, and nobody uses it yet.
    unsafe { LAST.init(Class::Global) };
}

/// Keeps the fields of a VMCS whose entry just failed, in place of those kept before. `space`: the number of the caller's.
#[cold]
#[inline(never)]
pub(crate) fn record(vmcs: &mut CurrentVmcs<'_>, space: u64, by_exit: bool) {
    // Interrupts are off: where it is being read, or another entry failed at this very moment, that one is as good.
    let Some(mut last) = LAST.try_lock() else {
        return;
    };
    // First: the VMREAD of a field that does not exist fails, and writes its own error there.
    let error = vmcs.read(exit_info::INSTRUCTION_ERROR);
    last.failures = last.failures.wrapping_add(1);
    last.pid = thread::current_pid();
    last.space = space;
    last.by_exit = by_exit;
    for (value, (encoding, ..)) in last.values.iter_mut().zip(FIELDS) {
        *value = if *encoding == exit_info::INSTRUCTION_ERROR.encoding() {
            Some(error)
        } else {
            vmcs.read_if_there(*encoding)
        };
    }
}

/// The file.
pub(crate) struct LastFailedEntry;

impl Show for LastFailedEntry {
    fn show(to: &Seq) {
        let with_host = to.may_see_addresses();
        let last = LAST.lock();
        to.text(c"failures ");
        to.number(last.failures);
        if last.failures == 0 {
            to.text(c"\n");
            return;
        }
        to.text(c"\npid ");
        to.number(last.pid.into());
        to.text(c"\nspace ");
        to.number(last.space);
        to.text(c"\nfailed ");
        if last.by_exit {
            let reason = last.value(exit_info::REASON.encoding()).unwrap_or(0) as u32;
            to.words(ExitReason::from_raw(reason).name());
        } else {
            to.text(c"instruction error ");
            to.number(last.value(exit_info::INSTRUCTION_ERROR.encoding()).unwrap_or(0));
        }
        to.text(c"\n");
        for ((_, area, name, bits, _), value) in FIELDS.iter().zip(&last.values) {
            if let Some(value) = value {
                if *area != "host" || with_host {
                    to.field(area, name, *bits, *value);
                }
            }
        }
    }
}

impl Record {
    fn value(&self, encoding: u32) -> Option<u64> {
        let index = FIELDS.iter().position(|field| field.0 == encoding)?;
        self.values[index]
    }
}

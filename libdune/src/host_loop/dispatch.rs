// SPDX-License-Identifier: MIT OR Apache-2.0

//! Syscall user dispatch (prctl PR_SET_SYSCALL_USER_DISPATCH), emulated: in Linux it would dispatch the host loop's calls.
//!
//! A thread that has it on looks up its calls in [`ALL`], so each comes to the slow path; the others pay nothing. What Linux
//! would dispatch becomes a SIGSYS in Dune mode, with Linux' siginfo, RIP behind the call and its number in RAX. Where Linux
//! would end the process (no handler, SIGSYS blocked, a bad selector) the thread leaves Dune mode, gives Linux the settings
//! and makes the call there, so that the process ends as it would have.
//!
//! A VMCALL is not dispatched, as it does not come to hooks. Hooks come first; a call that one makes itself is not dispatched.
//!
//! # Safety
//!
//! Called by the slow path. The selector is the program's memory, read as arguments are.

use dune_abi::Gprs;

use super::context::HostContext;
use super::context::Registers;
use super::report;
use super::slow::set_result;
use super::slow::Action;
use super::special;
use super::touch;
use super::upcall;
use crate::addr;
use crate::dispatch;
use crate::dispatch::Settings;
use crate::hook;
use crate::sys;
use crate::sys::SigInfo;
use crate::trap::TrapFrame;

/// The table of calls that need the slow path, for threads that have it on: all.
static ALL: [u8; 512] = [1; 512];

/// What the program's selector says.
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// `int 0x80` and SYSCALL have two bytes.
const CALL_BYTES: u64 = 2;

impl HostContext {
    /// Whether calls of the thread may be dispatched.
    pub fn is_dispatching(&self) -> bool {
        self.dispatch.is_on()
    }

    /// Has these settings hold from the next call on.
    pub fn set_dispatch(&mut self, settings: Settings) {
        self.table = if settings.is_on() {
            ALL.as_ptr()
        } else {
            self.process().special.as_ptr()
        };
        self.dispatch = settings;
    }
}

/// prctl: checked as Linux does.
pub(super) fn set(context: &mut HostContext, gprs: &Gprs) -> Action {
    let settings = Settings {
        mode: gprs.rsi,
        offset: gprs.rdx,
        bytes: gprs.r10,
        selector: gprs.r8,
    };
    let result = check(settings).map(|settings| context.set_dispatch(settings));
    set_result(context.run, result.map_or_else(|errno| -i64::from(errno), |()| 0));
    Action::Run
}

/// What is to hold. Linux looks at the arguments, as far as it can without taking them.
fn check(settings: Settings) -> Result<Settings, i32> {
    settings.are_accepted().map_err(|errno| errno.0)?;
    if settings.mode != dispatch::OFF && settings.selector >= addr::USER_END {
        return Err(libc::EFAULT);
    }
    settings.accepted().ok_or(libc::EINVAL)
}

/// What becomes of a call.
enum Verdict {
    Made,
    Dispatched,
    /// Linux would end the process.
    Fatal,
}

/// `rip` is behind the call; `byte` is what the selector says, if it can be read.
fn verdict(settings: &Settings, rip: u64, byte: Option<u8>) -> Verdict {
    if rip.wrapping_sub(settings.offset) < settings.bytes {
        return Verdict::Made;
    }
    match byte {
        Some(ALLOW) => Verdict::Made,
        Some(BLOCK) => Verdict::Dispatched,
        _ => Verdict::Fatal,
    }
}

fn read_selector(settings: &Settings) -> Option<u8> {
    match settings.selector {
        0 => Some(BLOCK),
        address => touch::read(address).ok(),
    }
}

/// Dispatches the SYSCALL that the vCPU came with, or returns `None` where it is to be made.
pub(super) fn catch(context: &mut HostContext) -> Option<Action> {
    let byte = read_selector(&context.dispatch);
    if byte == Some(ALLOW) || context.is_asked() {
        return None;
    }
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return Some(upcall::take_before_call(context));
    }
    let state = special::sync(context).unwrap_or_else(|errno| report::die_of_run(context, errno.into()));
    // SAFETY: The block lives as long as the context.
    let block = unsafe { &*context.block };
    let Some(state) = hook::behind_syscall(&state, block) else {
        sys::sigprocmask(libc::SIG_SETMASK, mask);
        return None;
    };
    let action = match verdict(&context.dispatch, state.rip, byte) {
        Verdict::Dispatched if is_taken(context, mask) => {
            hook::forget(block);
            let info = SigInfo::of_dispatch(state.rip, state.gprs.rax as i32, AUDIT_ARCH_X86_64);
            return Some(upcall::dispatch(context, &info, mask, &state));
        }
        Verdict::Made => None,
        _ => {
            let rip = state.rip.wrapping_sub(CALL_BYTES);
            Some(Registers::new(&state.gprs, rip, state.gprs.rsp, state.rflags))
        }
    };
    sys::sigprocmask(libc::SIG_SETMASK, mask);
    action.map(|registers| special::leave_with(context, |_| registers))
}

/// The same for an `int 0x80` that `frame` is behind.
pub(super) fn catch_int80(context: &mut HostContext, frame: &TrapFrame) -> Option<Action> {
    // SAFETY: The block lives as long as the context.
    let is_hooks = hook::is_inside(unsafe { &*context.block });
    let verdict = verdict(&context.dispatch, frame.rip, read_selector(&context.dispatch));
    if is_hooks || matches!(verdict, Verdict::Made) {
        return None;
    }
    let mut at = *frame;
    at.rip = frame.rip.wrapping_sub(CALL_BYTES);
    let mask = sys::sigprocmask(libc::SIG_BLOCK, u64::MAX);
    if context.pending.signal != 0 {
        return Some(upcall::take_at_frame(context, &at));
    }
    if matches!(verdict, Verdict::Dispatched) && is_taken(context, mask) {
        let info = SigInfo::of_dispatch(frame.rip, frame.rax as i32, AUDIT_ARCH_I386);
        return Some(upcall::dispatch_frame(context, &info, mask, frame));
    }
    sys::sigprocmask(libc::SIG_SETMASK, mask);
    Some(special::leave_with(context, |_| Registers::of_frame(&at)))
}

/// Whether the program has SIGSYS come to it. `mask` is its own.
fn is_taken(context: &HostContext, mask: u64) -> bool {
    context.actions().get(libc::SIGSYS).is_handler() && mask & sys::signal_bit(libc::SIGSYS) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: Settings = Settings {
        mode: dispatch::ON,
        offset: 0x1000,
        bytes: 0x10,
        selector: 0,
    };

    #[test]
    fn the_region_goes_before_the_selector() {
        for (rip, byte, is_made) in [
            (0xfff, Some(BLOCK), false),
            (0x1000, Some(BLOCK), true),
            (0x100f, None, true),
            (0x1010, Some(BLOCK), false),
            (0x1010, Some(ALLOW), true),
        ] {
            assert_eq!(matches!(verdict(&ON, rip, byte), Verdict::Made), is_made, "{rip:#x}");
        }
        assert!(matches!(verdict(&ON, 0, Some(2)), Verdict::Fatal));
        assert!(matches!(verdict(&ON, 0, None), Verdict::Fatal));
    }
}

// SPDX-License-Identifier: GPL-2.0

//! How much each user has of what the whole machine has to share.

use crate::sys::lock::Class;
use crate::sys::lock::SpinLock;
use crate::sys::module;
use crate::sys::thread;
use core::ptr::null_mut;
use core::ptr::NonNull;
use kernel::prelude::*;

/// What is limited.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Spaces,
    Vcpus,
}

impl Kind {
    fn limit(self) -> u32 {
        match self {
            Self::Spaces => module::param_user_spaces(),
            Self::Vcpus => module::param_user_vcpus(),
        }
    }
}

/// A user who has something.
struct User {
    uid: u32,
    /// By [`Kind`].
    has: [u32; 2],
    next: *mut User,
}

/// The list of users.
///
/// # Invariants
///
/// Holds each user once who has something, and owns its boxes.
struct Users(*mut User);

// SAFETY: The list owns what it points to.
unsafe impl Send for Users {}

static USERS: SpinLock<Users> = SpinLock::new(Users(null_mut()));

/// To be called once, before anything is charged.
pub(crate) fn init() {
    // SAFETY: A static, and nobody uses it yet.
    unsafe { USERS.init(Class::Registry) };
}

/// One of what is limited, on a user's account; dropping takes it off.
pub(crate) struct Charge {
    user: NonNull<User>,
    kind: Kind,
}

// SAFETY: The account is used under the lock of `USERS` only.
unsafe impl Send for Charge {}
// SAFETY: As above.
unsafe impl Sync for Charge {}

impl Charge {
    /// Charges the calling thread's user. EAGAIN where the user has as many as one may have, ENOMEM.
    pub(crate) fn new(kind: Kind) -> Result<Self> {
        let uid = thread::charged_user();
        let mut fresh = Some(KBox::new(
            User {
                uid,
                has: [0; 2],
                next: null_mut(),
            },
            GFP_KERNEL_ACCOUNT,
        )?);
        let may_exceed = thread::may_exceed_limits();
        let mut users = USERS.lock();
        let mut at = users.0;
        while !at.is_null() {
            // SAFETY: Under the lock everything in the list is alive.
            let user = unsafe { &*at };
            if user.uid == uid {
                break;
            }
            at = user.next;
        }
        let has = if at.is_null() {
            0
        } else {
            // SAFETY: As above.
            unsafe { (*at).has[kind as usize] }
        };
        if has >= kind.limit() && !may_exceed {
            drop(users);
            return Err(EAGAIN);
        }
        if at.is_null() {
            if let Some(mut user) = fresh.take() {
                user.next = users.0;
                at = KBox::into_raw(user);
                // INVARIANT: It was not in the list, and gets its first thing below.
                users.0 = at;
            }
        }
        let user = NonNull::new(at).ok_or(ENOMEM)?;
        // SAFETY: In the list, and the lock is held.
        unsafe { (*at).has[kind as usize] += 1 };
        drop(users);
        Ok(Self { user, kind })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let user = self.user.as_ptr();
        let mut users = USERS.lock();
        // SAFETY: This charge kept the user in the list, and under the lock everything in it is alive.
        unsafe {
            (*user).has[self.kind as usize] -= 1;
            if (*user).has != [0; 2] {
                return;
            }
            let mut link: *mut *mut User = &mut users.0;
            while *link != user {
                link = &mut (**link).next;
            }
            *link = (*user).next;
            drop(users);
            drop(KBox::from_raw(user));
        }
    }
}

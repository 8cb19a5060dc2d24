// SPDX-License-Identifier: GPL-2.0

//! Text that Linux asks for (linux/seq_file.h).

use super::bindings;
use core::ffi::CStr;
use core::ptr::NonNull;

/// A file of /proc or debugfs that is being read. Writing to it never sleeps; what does not fit is asked for again.
pub(crate) struct Seq(NonNull<bindings::seq_file>);

impl Seq {
    /// # Safety
    ///
    /// The file must be open while this is used.
    pub(crate) unsafe fn from_raw(file: NonNull<bindings::seq_file>) -> Self {
        Self(file)
    }

    /// A line `dune-NAME: VALUE`.
    pub(crate) fn named(&self, name: &CStr, value: u64) {
        // SAFETY: By the type's contract; a C string.
        unsafe { bindings::dune_seq_named(self.0.as_ptr(), name.as_ptr().cast(), value) };
    }

    /// A line `dune-exits-REASON: VALUE`.
    pub(crate) fn exits(&self, reason: u32, value: u64) {
        // SAFETY: By the type's contract.
        unsafe { bindings::dune_seq_exits(self.0.as_ptr(), reason, value) };
    }

    /// A number and a space.
    pub(crate) fn number(&self, value: u64) {
        // SAFETY: By the type's contract.
        unsafe { bindings::dune_seq_number(self.0.as_ptr(), value) };
    }

    pub(crate) fn words(&self, words: &str) {
        // SAFETY: By the type's contract; so many bytes.
        unsafe { bindings::dune_seq_words(self.0.as_ptr(), words.as_ptr().cast(), words.len() as u32) };
    }

    /// A line `AREA::NAME 0xVALUE`, with as many digits as the field has.
    pub(crate) fn field(&self, area: &str, name: &str, bits: u32, value: u64) {
        self.words(area);
        self.text(c"::");
        self.words(name);
        // SAFETY: By the type's contract.
        unsafe { bindings::dune_seq_hex(self.0.as_ptr(), bits / 4, value) };
    }

    /// Whether who opened the file may know where the kernel lies.
    pub(crate) fn may_see_addresses(&self) -> bool {
        // SAFETY: By the type's contract.
        unsafe { bindings::dune_seq_may_see_addresses(self.0.as_ptr()) }
    }

    pub(crate) fn text(&self, text: &CStr) {
        // SAFETY: By the type's contract; a C string.
        unsafe { bindings::dune_seq_text(self.0.as_ptr(), text.as_ptr().cast()) };
    }
}

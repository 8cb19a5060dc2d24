// SPDX-License-Identifier: MIT OR Apache-2.0

//! Writing to standard output and error from anywhere: no lock, no allocation, no buffer that outlives the call.

use core::fmt;
use core::fmt::Write;

/// A file descriptor, written to at once.
pub(crate) struct Out(pub i32);

/// What of one print goes out in one call.
struct Buffer<'o> {
    out: &'o Out,
    bytes: [u8; 256],
    used: usize,
}

impl Buffer<'_> {
    fn flush(&mut self) {
        self.out.bytes(&self.bytes[..self.used]);
        self.used = 0;
    }
}

impl Write for Buffer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.used == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.used] = byte;
            self.used += 1;
        }
        Ok(())
    }
}

pub(crate) const STDOUT: Out = Out(libc::STDOUT_FILENO);
pub(crate) const STDERR: Out = Out(libc::STDERR_FILENO);

impl Out {
    /// Writes formatted text; what cannot be written is lost.
    pub fn print(self, arguments: fmt::Arguments<'_>) {
        let mut buffer = Buffer {
            out: &self,
            bytes: [0; 256],
            used: 0,
        };
        let _ = buffer.write_fmt(arguments);
        buffer.flush();
    }

    /// Writes bytes; how many.
    pub fn bytes(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            // SAFETY: The slice's own bytes.
            let written = unsafe { libc::write(self.0, rest.as_ptr().cast(), rest.len()) };
            if written <= 0 {
                break;
            }
            done += written as usize;
        }
        done
    }
}

/// Says what cannot go on, and ends the process.
pub(crate) fn die(arguments: fmt::Arguments<'_>) -> ! {
    STDERR.print(format_args!("dune: fatal: {arguments}\n"));
    // SAFETY: Ends the process without running anything of it.
    unsafe { libc::_exit(libc::EXIT_FAILURE) }
}

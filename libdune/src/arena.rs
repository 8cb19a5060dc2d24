// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of a Dune thread (see `layout`): reserved, guarded, given back.

use crate::layout;
use crate::sys;
use crate::sys::Errno;

/// A reservation of `layout::ARENA_BYTES`, aligned to its size, zeroed where nobody wrote.
pub(crate) struct Arena {
    start: u64,
}

impl Arena {
    /// Reserves the memory and makes what is needed at once accessible, but for the guard pages.
    pub fn new() -> Result<Self, Errno> {
        let bytes = layout::ARENA_BYTES as u64;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: Fresh memory; what is given back or protected is part of it and nobody has seen it.
        unsafe {
            let got = sys::mmap(2 * bytes as usize, libc::PROT_NONE, flags, -1, 0)?;
            let start = got.next_multiple_of(bytes);
            let arena = Self { start };
            if start > got {
                sys::munmap(got, (start - got) as usize)?;
            }
            let rest = got + 2 * bytes - (start + bytes);
            if rest > 0 {
                sys::munmap(start + bytes, rest as usize)?;
            }
            // A few pages of it are used: huge ones would be zeroed at the first touch. An old kernel may refuse.
            let _ = sys::madvise(start, bytes as usize, libc::MADV_NOHUGEPAGE);
            let used = layout::POOL + layout::POOL_STEP;
            sys::mprotect(start, used, libc::PROT_READ | libc::PROT_WRITE)?;
            for guard in layout::GUARDS {
                sys::mprotect(start + guard as u64, layout::PAGE, libc::PROT_NONE)?;
            }
            Ok(arena)
        }
    }

    /// Address of the byte at an offset of `layout`.
    pub fn at(&self, offset: usize) -> u64 {
        self.start + offset as u64
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: The owner drops it when nothing uses it any more.
        let _ = unsafe { sys::munmap(self.start, layout::ARENA_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_accessible_but_for_the_guards() {
        let arena = Arena::new().unwrap();
        assert_eq!(arena.at(0) % layout::ARENA_BYTES as u64, 0);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let access = |offset: usize| {
            let address = arena.at(offset);
            let line = maps.lines().find(|line| {
                let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                let number = |text| u64::from_str_radix(text, 16).unwrap();
                (number(start)..number(end)).contains(&address)
            });
            line.map(|line| line.split(' ').nth(1).unwrap().to_owned())
        };
        for guard in layout::GUARDS {
            assert_eq!(access(guard).as_deref(), Some("---p"), "{guard:#x}");
            assert_eq!(access(guard + layout::PAGE).as_deref(), Some("rw-p"), "{guard:#x}");
        }
        for top in [
            layout::IST_TOP,
            layout::DOUBLE_TOP,
            layout::REPORT_TOP,
            layout::HOST_STACK_TOP,
        ] {
            assert_eq!(access(top - 8).as_deref(), Some("rw-p"), "{top:#x}");
        }
        assert_eq!(access(layout::POOL).as_deref(), Some("rw-p"));
        assert_eq!(access(layout::POOL + layout::POOL_STEP).as_deref(), Some("---p"));
    }
}

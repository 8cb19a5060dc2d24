// SPDX-License-Identifier: MIT OR Apache-2.0

//! The process' memory map, from /proc/self/maps.
//!
//! # Safety
//!
//! The text is in a mapping of its own, which is unmapped when nobody looks at it any more: no allocator is used.

use core::ffi::c_char;
use core::ffi::c_int;
use core::ptr;
use core::slice;

use crate::out::STDOUT;

const PROCMAP_TYPE_UNKNOWN: c_int = 0;
const PROCMAP_TYPE_FILE: c_int = 1;
const PROCMAP_TYPE_ANONYMOUS: c_int = 2;
const PROCMAP_TYPE_HEAP: c_int = 3;
const PROCMAP_TYPE_STACK: c_int = 4;
const PROCMAP_TYPE_VSYSCALL: c_int = 5;
const PROCMAP_TYPE_VDSO: c_int = 6;
const PROCMAP_TYPE_VVAR: c_int = 7;

/// A mapping of the process.
#[repr(C)]
pub struct dune_procmap_entry {
    pub begin: usize,
    pub end: usize,
    pub offset: u64,
    /// Readable.
    pub r: bool,
    /// Writable.
    pub w: bool,
    /// Executable.
    pub x: bool,
    /// Private, else shared.
    pub p: bool,
    /// Its file, or what Linux calls it; "" where there is nothing. Only while the callback runs.
    pub path: *mut c_char,
    /// `PROCMAP_TYPE_*`
    pub r#type: c_int,
}

/// Called for each mapping.
pub type dune_procmap_cb = Option<unsafe extern "C" fn(entry: *const dune_procmap_entry)>;

/// The text of the map.
pub(crate) struct Maps {
    text: *mut u8,
    used: usize,
    bytes: usize,
}

/// A line of it.
pub(crate) struct Line {
    pub begin: u64,
    pub end: u64,
    offset: u64,
    access: [u8; 4],
    /// Place of the path in the text, terminated by 0.
    path: usize,
}

impl Line {
    pub fn is_accessible(&self) -> bool {
        self.access[..3].iter().any(|access| *access != b'-')
    }
}

impl Maps {
    /// Reads it; `None` where there is no memory, or no /proc.
    pub fn read() -> Option<Self> {
        let mut bytes = 1 << 16;
        loop {
            let mut maps = Self::new(bytes)?;
            if maps.fill()? {
                return Some(maps);
            }
            bytes *= 4;
        }
    }

    fn new(bytes: usize) -> Option<Self> {
        // SAFETY: New memory.
        let text = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (text != libc::MAP_FAILED).then_some(Self {
            text: text.cast(),
            used: 0,
            bytes,
        })
    }

    /// Whether all of it had room. Ends of lines become 0.
    fn fill(&mut self) -> Option<bool> {
        // SAFETY: A terminated string; reads into the rest of the buffer, of which a byte stays 0.
        unsafe {
            let fd = libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if fd < 0 {
                return None;
            }
            let is_all = loop {
                let room = self.bytes - self.used - 1;
                if room == 0 {
                    break false;
                }
                let got = libc::read(fd, self.text.add(self.used).cast(), room);
                if got <= 0 {
                    break true;
                }
                self.used += got as usize;
            };
            libc::close(fd);
            for byte in slice::from_raw_parts_mut(self.text, self.used) {
                if *byte == b'\n' {
                    *byte = 0;
                }
            }
            Some(is_all)
        }
    }

    fn text(&self) -> &[u8] {
        // SAFETY: That much was read.
        unsafe { slice::from_raw_parts(self.text, self.used) }
    }

    /// The mappings, in order.
    pub fn iter(&self) -> impl Iterator<Item = Line> + '_ {
        let mut at = 0;
        core::iter::from_fn(move || {
            let rest = self.text().get(at..)?;
            let length = rest.iter().position(|byte| *byte == 0)?;
            let line = parse(&rest[..length], at);
            at += length + 1;
            Some(line)
        })
        .flatten()
    }

    /// The path of a line, terminated.
    fn path(&self, line: &Line) -> (*mut c_char, &[u8]) {
        let path = &self.text()[line.path..];
        let length = path.iter().position(|byte| *byte == 0).unwrap_or(0);
        (self.text.wrapping_add(line.path).cast(), &path[..length])
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        // SAFETY: Its own mapping.
        unsafe { libc::munmap(self.text.cast(), self.bytes) };
    }
}

/// `begin-end rwxp offset dev inode   path`, which begins at `place` in the text.
fn parse(line: &[u8], place: usize) -> Option<Line> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let (begin, end) = split_at_dash(fields.next()?)?;
    let access = fields.next()?.try_into().ok()?;
    let offset = hex(fields.next()?)?;
    let path = fields.nth(2).unwrap_or(&[]);
    let blanks = path.iter().take_while(|byte| **byte == b' ').count();
    Some(Line {
        begin,
        end,
        offset,
        access,
        path: place + line.len() - path.len() + blanks,
    })
}

fn split_at_dash(range: &[u8]) -> Option<(u64, u64)> {
    let dash = range.iter().position(|byte| *byte == b'-')?;
    Some((hex(&range[..dash])?, hex(&range[dash + 1..])?))
}

fn hex(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
}

fn type_of(path: &[u8]) -> c_int {
    match path {
        [] => PROCMAP_TYPE_ANONYMOUS,
        b"[heap]" => PROCMAP_TYPE_HEAP,
        b"[stack]" => PROCMAP_TYPE_STACK,
        b"[vsyscall]" => PROCMAP_TYPE_VSYSCALL,
        b"[vdso]" => PROCMAP_TYPE_VDSO,
        _ if path.starts_with(b"[vvar") => PROCMAP_TYPE_VVAR,
        [b'/', ..] => PROCMAP_TYPE_FILE,
        _ => PROCMAP_TYPE_UNKNOWN,
    }
}

/// Calls `cb` for each mapping of the process, in order of addresses.
#[no_mangle]
pub unsafe extern "C" fn dune_procmap_iterate(cb: dune_procmap_cb) {
    let (Some(maps), Some(cb)) = (Maps::read(), cb) else {
        return;
    };
    for line in maps.iter() {
        let (path, name) = maps.path(&line);
        let entry = dune_procmap_entry {
            begin: line.begin as usize,
            end: line.end as usize,
            offset: line.offset,
            r: line.access[0] == b'r',
            w: line.access[1] == b'w',
            x: line.access[2] == b'x',
            p: line.access[3] == b'p',
            path,
            r#type: type_of(name),
        };
        // SAFETY: The caller's function.
        unsafe { cb(&raw const entry) };
    }
}

/// Prints the mappings of the process.
#[no_mangle]
pub extern "C" fn dune_procmap_dump() {
    let Some(maps) = Maps::read() else { return };
    for line in maps.iter() {
        let name = maps.path(&line).1;
        STDOUT.print(format_args!(
            "{:#018x}-{:#018x} {} {:08x} {}\n",
            line.begin,
            line.end,
            core::str::from_utf8(&line.access).unwrap_or("????"),
            line.offset,
            core::str::from_utf8(name).unwrap_or("?"),
        ));
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0

//! dune_elf_*: 64-bit ELF files, in a file or in memory.
//!
//! # Safety
//!
//! A file is mapped as long as it is open; memory is the caller's, who keeps it that long. What its headers say is looked
//! at against its length before it is followed. The tables are copies, since they need not be aligned in the file.

use core::ffi::c_char;
use core::ffi::c_int;
use core::ffi::c_void;
use core::ptr;
use core::slice;

use goblin::elf::header::ELFCLASS64;
use goblin::elf::header::ELFDATA2LSB;
use goblin::elf::Elf;
use libc::Elf64_Ehdr;
use libc::Elf64_Phdr;
use libc::Elf64_Shdr;

use crate::out::STDOUT;

/// An ELF file that was opened.
#[repr(C)]
pub struct dune_elf {
    /// The file, or -1.
    pub fd: c_int,
    /// Its bytes.
    pub mem: *mut u8,
    pub len: c_int,
    pub hdr: Elf64_Ehdr,
    /// Copies of its program and section headers.
    pub phdr: *mut Elf64_Phdr,
    pub shdr: *mut Elf64_Shdr,
    /// Names of its sections; NULL where it has none.
    pub shdrstr: *mut c_char,
    /// The program's.
    pub r#priv: *mut c_void,
}

/// Called for each program header; anything but 0 ends that.
pub type dune_elf_phcb = Option<unsafe extern "C" fn(elf: *mut dune_elf, phdr: *mut Elf64_Phdr) -> c_int>;
/// Called for each section header with its name and number; anything but 0 ends that.
pub type dune_elf_shcb =
    Option<unsafe extern "C" fn(elf: *mut dune_elf, sname: *const c_char, snum: c_int, shdr: *mut Elf64_Shdr) -> c_int>;

fn last_errno() -> c_int {
    -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Opens an ELF file.
///
/// 0, -EINVAL where it is no ELF file of 64 bits, else a negative errno.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_open(elf: *mut dune_elf, path: *const c_char) -> c_int {
    // SAFETY: The caller's path. The mapping is the file's, and given back where it is no ELF file.
    unsafe {
        let fd = libc::open(path, libc::O_RDONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return last_errno();
        }
        let mut stat: libc::stat = core::mem::zeroed();
        if libc::fstat(fd, &mut stat) != 0 {
            let errno = last_errno();
            libc::close(fd);
            return errno;
        }
        let Some(len) = c_int::try_from(stat.st_size).ok().filter(|len| *len > 0) else {
            libc::close(fd);
            return -libc::EINVAL;
        };
        let bytes = len as usize;
        let mem = libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0);
        if mem == libc::MAP_FAILED {
            let errno = last_errno();
            libc::close(fd);
            return errno;
        }
        let result = open(elf, fd, mem.cast(), len);
        if result != 0 {
            libc::munmap(mem, bytes);
            libc::close(fd);
        }
        result
    }
}

/// The same of `len` bytes in memory, which must stay until dune_elf_close.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_open_mem(elf: *mut dune_elf, mem: *mut c_void, len: c_int) -> c_int {
    if mem.is_null() || len <= 0 {
        return -libc::EINVAL;
    }
    // SAFETY: The caller's memory.
    unsafe { open(elf, -1, mem.cast(), len) }
}

unsafe fn open(elf: *mut dune_elf, fd: c_int, mem: *mut u8, len: c_int) -> c_int {
    // SAFETY: The caller's memory.
    let bytes = unsafe { slice::from_raw_parts(mem, len as usize) };
    match tables(bytes) {
        Some((hdr, phdr, shdr, names)) => {
            // SAFETY: The caller's structure. The name table ends in 0 and lies in the file.
            unsafe {
                elf.write(dune_elf {
                    fd,
                    mem,
                    len,
                    hdr,
                    phdr,
                    shdr,
                    shdrstr: names.map_or(ptr::null_mut(), |offset| mem.add(offset).cast()),
                    r#priv: ptr::null_mut(),
                });
            }
            0
        }
        None => -libc::EINVAL,
    }
}

type Tables = (Elf64_Ehdr, *mut Elf64_Phdr, *mut Elf64_Shdr, Option<usize>);

/// The header, copies of the tables, and where the names of sections begin.
fn tables(bytes: &[u8]) -> Option<Tables> {
    let parsed = Elf::parse_header(bytes).ok()?;
    let is_ours = parsed.e_ident[4] == ELFCLASS64 && parsed.e_ident[5] == ELFDATA2LSB;
    if !is_ours || bytes.len() < size_of::<Elf64_Ehdr>() {
        return None;
    }
    // SAFETY: That many bytes are there, and any are a value.
    let hdr: Elf64_Ehdr = unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) };
    let names = name_table(bytes, &hdr);
    let phdr = copy::<Elf64_Phdr>(bytes, hdr.e_phoff, hdr.e_phnum, hdr.e_phentsize)?;
    let Some(shdr) = copy::<Elf64_Shdr>(bytes, hdr.e_shoff, hdr.e_shnum, hdr.e_shentsize) else {
        // SAFETY: Allocated a moment ago, or null.
        unsafe { libc::free(phdr.cast()) };
        return None;
    };
    Some((hdr, phdr, shdr, names))
}

/// A copy of a table; null where it has no entry.
fn copy<T>(bytes: &[u8], offset: u64, count: u16, size: u16) -> Option<*mut T> {
    if count == 0 {
        return Some(ptr::null_mut());
    }
    if usize::from(size) != size_of::<T>() {
        return None;
    }
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::from(count) * size_of::<T>())?;
    let table = bytes.get(start..end)?;
    // SAFETY: As many bytes as are copied.
    unsafe {
        let copy = libc::malloc(table.len()).cast::<u8>();
        if copy.is_null() {
            return None;
        }
        copy.copy_from_nonoverlapping(table.as_ptr(), table.len());
        Some(copy.cast())
    }
}

fn name_table(bytes: &[u8], hdr: &Elf64_Ehdr) -> Option<usize> {
    let at = usize::try_from(hdr.e_shoff).ok()?;
    let at = at.checked_add(usize::from(hdr.e_shstrndx) * size_of::<Elf64_Shdr>())?;
    let header = bytes.get(at..at.checked_add(size_of::<Elf64_Shdr>())?)?;
    // SAFETY: As many bytes as it has, and any are a value.
    let header: Elf64_Shdr = unsafe { ptr::read_unaligned(header.as_ptr().cast()) };
    let start = usize::try_from(header.sh_offset).ok()?;
    let end = start.checked_add(usize::try_from(header.sh_size).ok()?)?;
    let is_terminated = hdr.e_shstrndx < hdr.e_shnum && bytes.get(start..end)?.last() == Some(&0);
    is_terminated.then_some(start)
}

/// Closes a file, and frees what was copied of it. 0.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_close(elf: *mut dune_elf) -> c_int {
    // SAFETY: Opened by the functions above.
    unsafe {
        libc::free((*elf).phdr.cast());
        libc::free((*elf).shdr.cast());
        (*elf).phdr = ptr::null_mut();
        (*elf).shdr = ptr::null_mut();
        (*elf).shdrstr = ptr::null_mut();
        if (*elf).fd >= 0 {
            libc::munmap((*elf).mem.cast(), (*elf).len as usize);
            libc::close((*elf).fd);
            (*elf).fd = -1;
        }
        (*elf).mem = ptr::null_mut();
    }
    0
}

/// Calls `cb` for each section header. 0, what `cb` returned, or -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_iter_sh(elf: *mut dune_elf, cb: dune_elf_shcb) -> c_int {
    let Some(cb) = cb else { return -libc::EINVAL };
    // SAFETY: Opened by the functions above; the callback is the caller's.
    unsafe {
        if (*elf).shdr.is_null() {
            return 0;
        }
        for number in 0..(*elf).hdr.e_shnum {
            let header = (*elf).shdr.add(number.into());
            let result = cb(elf, section_name(elf, header), number.into(), header);
            if result != 0 {
                return result;
            }
        }
    }
    0
}

/// The name of a section, "" where it has none.
unsafe fn section_name(elf: *const dune_elf, header: *const Elf64_Shdr) -> *const c_char {
    // SAFETY: An open file, whose name table lies in it and ends in 0.
    unsafe {
        let names = (*elf).shdrstr;
        if names.is_null() {
            return c"".as_ptr();
        }
        let table = (*elf).shdr.add((*elf).hdr.e_shstrndx.into());
        let offset = u64::from((*header).sh_name);
        if offset < (*table).sh_size {
            names.add(offset as usize)
        } else {
            c"".as_ptr()
        }
    }
}

/// Calls `cb` for each program header. 0, what `cb` returned, or -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_iter_ph(elf: *mut dune_elf, cb: dune_elf_phcb) -> c_int {
    let Some(cb) = cb else { return -libc::EINVAL };
    // SAFETY: Opened by the functions above; the callback is the caller's.
    unsafe {
        if (*elf).phdr.is_null() {
            return 0;
        }
        for number in 0..(*elf).hdr.e_phnum {
            let result = cb(elf, (*elf).phdr.add(number.into()));
            if result != 0 {
                return result;
            }
        }
    }
    0
}

/// Maps a segment at its address + `off`, over whatever is there: what the file has of it, zeroes behind that, with the
/// access that it says.
///
/// 0, -EINVAL where the file has no such bytes, else a negative errno.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_load_ph(elf: *mut dune_elf, phdr: *mut Elf64_Phdr, off: libc::off_t) -> c_int {
    const PAGE: u64 = 4096;
    // SAFETY: The caller's, of an open file.
    let (bytes, segment) = unsafe { (slice::from_raw_parts((*elf).mem, (*elf).len as usize), phdr.read()) };
    let range = || -> Option<(&[u8], u64, u64)> {
        let first = usize::try_from(segment.p_offset).ok()?;
        let contents = bytes.get(first..first.checked_add(usize::try_from(segment.p_filesz).ok()?)?)?;
        let start = segment.p_vaddr.checked_add_signed(off)?;
        let end = start.checked_add(segment.p_memsz)?.checked_next_multiple_of(PAGE)?;
        (segment.p_filesz <= segment.p_memsz).then_some((contents, start, end))
    };
    let Some((contents, start, end)) = range() else {
        return -libc::EINVAL;
    };
    let page = start & !(PAGE - 1);
    let size = (end - page) as usize;
    if size == 0 {
        return 0;
    }
    let bit = |flag: u32, protection: c_int| if segment.p_flags & flag != 0 { protection } else { 0 };
    let protection =
        bit(libc::PF_R, libc::PROT_READ) | bit(libc::PF_W, libc::PROT_WRITE) | bit(libc::PF_X, libc::PROT_EXEC);
    // SAFETY: The caller wants the segment there. What is copied fits in.
    unsafe {
        let got = libc::mmap(
            page as *mut c_void,
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        );
        if got == libc::MAP_FAILED {
            return last_errno();
        }
        (start as *mut u8).copy_from_nonoverlapping(contents.as_ptr(), contents.len());
        if libc::mprotect(got, size, protection) != 0 {
            return last_errno();
        }
    }
    0
}

/// Prints the headers of a file. 0.
#[no_mangle]
pub unsafe extern "C" fn dune_elf_dump(elf: *mut dune_elf) -> c_int {
    // SAFETY: Opened by the functions above.
    unsafe {
        let hdr = &(*elf).hdr;
        STDOUT.print(format_args!(
            "dune: ELF: type {}, machine {}, entry {:#x}, {} program headers, {} sections\n",
            hdr.e_type, hdr.e_machine, hdr.e_entry, hdr.e_phnum, hdr.e_shnum
        ));
        dune_elf_iter_ph(elf, Some(dump_ph));
        dune_elf_iter_sh(elf, Some(dump_sh));
    }
    0
}

unsafe extern "C" fn dump_ph(_: *mut dune_elf, phdr: *mut Elf64_Phdr) -> c_int {
    // SAFETY: From the iteration.
    let p = unsafe { &*phdr };
    STDOUT.print(format_args!(
        "dune: segment: type {:#x}, offset {:#x}, address {:#x}, {:#x} bytes of {:#x}, flags {:#x}\n",
        p.p_type, p.p_offset, p.p_vaddr, p.p_filesz, p.p_memsz, p.p_flags
    ));
    0
}

unsafe extern "C" fn dump_sh(_: *mut dune_elf, sname: *const c_char, snum: c_int, shdr: *mut Elf64_Shdr) -> c_int {
    // SAFETY: From the iteration.
    let (name, s) = unsafe { (core::ffi::CStr::from_ptr(sname), &*shdr) };
    STDOUT.print(format_args!(
        "dune: section {snum}: {}, type {:#x}, address {:#x}, offset {:#x}, {:#x} bytes\n",
        name.to_str().unwrap_or("?"),
        s.sh_type,
        s.sh_addr,
        s.sh_offset,
        s.sh_size
    ));
    0
}

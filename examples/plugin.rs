// SPDX-License-Identifier: MIT OR Apache-2.0

//! A host program with a secret, and plugins that it does not trust.
//!
//! A plugin is a shared object from C (`examples/plugin/`). The host relocates it into pages of its own, runs it at CPL3 with
//! a buffer, and answers its system calls: some allowed, some emulated, the rest denied. One plugin does its work; the other
//! tries everything: each attempt is an error value, and the host goes on.

use std::ptr;

use dune_examples::die;
use goblin::elf::program_header::PF_W;
use goblin::elf::program_header::PF_X;
use goblin::elf::program_header::PT_LOAD;
use goblin::elf::reloc::R_X86_64_64;
use goblin::elf::reloc::R_X86_64_GLOB_DAT;
use goblin::elf::reloc::R_X86_64_JUMP_SLOT;
use goblin::elf::reloc::R_X86_64_RELATIVE;
use goblin::elf::Elf;
use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::user::UserSlice;
use libdune::Dune;
use libdune::Gva;
use libdune::Permissions;
use libdune::Thread;

static GOOD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/good.so"));
static HOSTILE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hostile.so"));

const PAGE: usize = 4096;
const STACK_BYTES: usize = 4 * PAGE;
/// Ticks that a plugin may have without a system call.
const TICKS: u64 = 30_000_000;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the hostile plugin tries, by number.
const ATTEMPTS: [&str; 11] = [
    "read the secret",
    "write the host's memory",
    "VMCALL past the host",
    "open a file",
    "have the host read its secret",
    "have the host read too far",
    "flags DF NT AC IOPL at a call",
    "stack in the host's memory",
    "jump into the host's memory",
    "turn interrupts off",
    "loop for ever",
];

/// How a plugin ended.
#[derive(Debug)]
enum End {
    /// It said so, with this result.
    Exit(i64),
    /// It did what it may not.
    Stopped(UserExit),
}

/// Pages of the process for a plugin.
struct Pages {
    start: *mut u8,
    bytes: usize,
}

impl Pages {
    fn new(bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(PAGE);
        // SAFETY: A new mapping.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self {
            start: start.cast(),
            bytes,
        })
    }

    fn address(&self) -> u64 {
        self.start as u64
    }

    /// The bytes while they are the host's.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: Mapped, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Gives the pages from `first` on to CPL3.
    fn give(&self, thread: &Thread<'_>, first: usize, bytes: usize, permissions: Permissions) -> Result<()> {
        let start = self.address() + first as u64;
        if permissions.contains(Permissions::EXECUTE) {
            // SAFETY: The plugin's pages.
            let result = unsafe { libc::mprotect(start as *mut _, bytes, libc::PROT_READ | libc::PROT_EXEC) };
            if result != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        self.protect(thread, first, bytes, Permissions::USER | permissions)
    }

    fn protect(&self, thread: &Thread<'_>, first: usize, bytes: usize, permissions: Permissions) -> Result<()> {
        let start = Gva::new(self.address() + first as u64).ok_or("not an address")?;
        let space = thread.current_address_space();
        space.protect(start, bytes as u64, permissions)?.flush();
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // What is mapped here next would be CPL3's too. Where that fails the memory stays.
        let taken = Thread::with_current(|thread| self.protect(thread, 0, self.bytes, Permissions::ALL));
        if matches!(taken, Some(Err(_))) {
            return;
        }
        // SAFETY: The plugin's pages, which nobody uses any more.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// A plugin, loaded.
struct Plugin {
    _image: Pages,
    stack: Pages,
    buffer: Pages,
    entry: u64,
    context: UserContext,
}

impl Plugin {
    /// Relocates the shared object into fresh pages and gives them to CPL3.
    fn load(thread: &Thread<'_>, object: &[u8], buffer: &[u8]) -> Result<Self> {
        let elf = Elf::parse(object)?;
        let segments: Vec<_> = elf.program_headers.iter().filter(|h| h.p_type == PT_LOAD).collect();
        let end = segments
            .iter()
            .map(|h| h.p_vaddr + h.p_memsz)
            .max()
            .ok_or("no segment")?;
        let mut image = Pages::new(usize::try_from(end)?)?;
        let base = image.address();
        for segment in &segments {
            let content = object.get(segment.file_range()).ok_or("segment beyond the file")?;
            let to = image.bytes_mut().get_mut(segment.p_vaddr as usize..).ok_or("segment")?;
            to.get_mut(..content.len()).ok_or("segment")?.copy_from_slice(content);
        }
        for relocation in elf.dynrelas.iter().chain(elf.pltrelocs.iter()) {
            let addend = relocation.r_addend.unwrap_or(0) as u64;
            let symbol = elf.dynsyms.get(relocation.r_sym).filter(|symbol| symbol.st_shndx != 0);
            let value = match (relocation.r_type, symbol) {
                (R_X86_64_RELATIVE, _) => base.wrapping_add(addend),
                (R_X86_64_64 | R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT, Some(symbol)) => {
                    base.wrapping_add(symbol.st_value).wrapping_add(addend)
                }
                (kind, _) => return Err(format!("relocation of type {kind}, or of what is not there").into()),
            };
            let offset = usize::try_from(relocation.r_offset)?;
            let place = image
                .bytes_mut()
                .get_mut(offset..offset + 8)
                .ok_or("relocation beyond the image")?;
            place.copy_from_slice(&value.to_le_bytes());
        }
        let entry = elf
            .dynsyms
            .iter()
            .find(|symbol| elf.dynstrtab.get_at(symbol.st_name) == Some("plugin"))
            .ok_or("no function plugin")?
            .st_value;
        for segment in &segments {
            let first = segment.p_vaddr as usize / PAGE * PAGE;
            let behind = ((segment.p_vaddr + segment.p_memsz) as usize).next_multiple_of(PAGE);
            let permissions = match segment.p_flags {
                flags if flags & PF_X != 0 => Permissions::EXECUTE,
                flags if flags & PF_W != 0 => Permissions::WRITE,
                _ => Permissions::READ,
            };
            image.give(thread, first, behind - first, permissions)?;
        }
        let stack = Pages::new(STACK_BYTES)?;
        stack.give(thread, 0, stack.bytes, Permissions::WRITE)?;
        let mut pages = Pages::new(buffer.len())?;
        pages.bytes_mut()[..buffer.len()].copy_from_slice(buffer);
        pages.give(thread, 0, pages.bytes, Permissions::WRITE)?;
        Ok(Self {
            _image: image,
            stack,
            buffer: pages,
            entry: base + entry,
            context: UserContext::new(thread),
        })
    }

    /// Calls the plugin and answers it until it ends.
    fn run(&mut self, thread: &Thread<'_>, bytes: usize, what: u64, address: u64) -> End {
        let top = self.stack.address() + self.stack.bytes as u64;
        let registers = self.context.registers_mut();
        *registers = Default::default();
        registers.rip = self.entry;
        // As if it had been called, by nobody.
        registers.rsp = top - 8;
        (registers.rdi, registers.rsi) = (self.buffer.address(), bytes as u64);
        (registers.rdx, registers.rcx) = (what, address);
        loop {
            match self.context.run_for(thread, TICKS) {
                UserExit::Syscall => {
                    let (number, arguments) = self.context.system_call();
                    if number == libc::SYS_exit as u64 {
                        return End::Exit(arguments[0] as i64);
                    }
                    let result = answer(thread, number as i64, &arguments);
                    self.context.set_result(result as u64);
                }
                exit => return End::Stopped(exit),
            }
        }
    }
}

/// The policy: what becomes of a plugin's system call.
fn answer(thread: &Thread<'_>, number: i64, arguments: &[u64; 6]) -> i64 {
    const LONGEST: u64 = 200;
    match number {
        // Emulated: a plugin is a world of its own.
        libc::SYS_getpid => 1,
        libc::SYS_write if arguments[2] > LONGEST => -i64::from(libc::E2BIG),
        libc::SYS_write => {
            let text =
                UserSlice::readable(thread, arguments[1], arguments[2] as usize).and_then(|slice| slice.to_vec());
            match text {
                Ok(text) => {
                    print!("  plugin: {}", String::from_utf8_lossy(&text));
                    text.len() as i64
                }
                Err(_) => -i64::from(libc::EFAULT),
            }
        }
        // Allowed.
        // SAFETY: It has no arguments and no effect.
        libc::SYS_getuid => unsafe { libc::syscall(libc::SYS_getuid) },
        _ => -i64::from(libc::EPERM),
    }
}

fn good(thread: &Thread<'_>) -> Result<bool> {
    let text = b"an operating system is what a browser is to its plugins";
    let mut plugin = Plugin::load(thread, GOOD, text)?;
    let end = plugin.run(thread, text.len(), 0, 0);
    let after = UserSlice::readable(thread, plugin.buffer.address(), text.len())?.to_vec()?;
    println!("good plugin: {end:?}, {:?}", String::from_utf8_lossy(&after));
    Ok(matches!(end, End::Exit(11)) && after.starts_with(b"An Operating System Is"))
}

/// What an attempt came to, and whether that is as it should be.
fn judge(end: &End) -> (String, bool) {
    match end {
        End::Exit(result) if (-4095..0).contains(result) => {
            let error = std::io::Error::from_raw_os_error(-*result as i32);
            (format!("denied: {error}"), true)
        }
        End::Exit(result) => (format!("went through: {result}"), false),
        End::Stopped(UserExit::PageFault(fault)) => (format!("{fault:?}"), true),
        End::Stopped(UserExit::Exception { vector, .. }) => (format!("Exception({vector})"), true),
        End::Stopped(exit) => (format!("{exit:?}"), true),
    }
}

fn hostile(thread: &Thread<'_>) -> Result<bool> {
    const SECRET: u64 = 0x5ec7_e75e_c7e7_5ec7;
    let secret = Box::new([SECRET; 8]);
    let mut all_well = true;
    println!("{:<32} what the host got", "hostile plugin");
    for (number, attempt) in ATTEMPTS.into_iter().enumerate() {
        let mut plugin = Plugin::load(thread, HOSTILE, &[0; PAGE])?;
        let end = plugin.run(thread, PAGE, number as u64, &raw const secret[1] as u64);
        let leaked = UserSlice::readable(thread, plugin.buffer.address(), 8)?.to_vec()? == SECRET.to_le_bytes();
        // SAFETY: Reads the host's own memory again.
        let is_whole = unsafe { (&raw const *secret).read_volatile() } == [SECRET; 8];
        let (text, is_error) = judge(&end);
        let is_well = is_error && is_whole && !leaked;
        all_well &= is_well;
        println!(
            "  {attempt:<30} {text}{}",
            if is_well { "" } else { "  <-- NOT STOPPED" }
        );
    }
    Ok(all_well)
}

fn main() {
    let dune = Dune::enter().unwrap_or_else(|error| die(&error));
    let results = [good(&dune.thread()), hostile(&dune.thread())];
    let after = std::fs::read_to_string("/proc/self/comm").is_ok();
    dune.leave();
    for result in &results {
        if let Err(error) = result {
            eprintln!("plugin: {error}");
        }
    }
    if !after || !results.iter().all(|result| matches!(result, Ok(true))) {
        std::process::exit(1);
    }
    println!("the host goes on, its secret is its own");
}

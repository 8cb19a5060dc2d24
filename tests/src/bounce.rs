// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls of code at CPL3 that has a page table of its own: its pointers mean something else to Linux, and are bounced.

use libdune::hook::Bounce;
use libdune::hook::BounceError;
use libdune::user::UserContext;
use libdune::user::UserExit;
use libdune::Gva;
use libdune::Hva;
use libdune::PageTable;
use libdune::Permissions;
use libdune::Thread;

use crate::framework::Test;
use crate::support::enter;
use crate::support::Map;
use crate::support::PAGE;
use crate::user::code;
use crate::user::PLENTY;

pub const TESTS: &[Test] = &[
    Test::asserting("pointers_of_cpl3_are_bounced", pointers_of_cpl3_are_bounced),
    Test::asserting(
        "pointers_of_cpl3_reach_nothing_of_the_host",
        pointers_of_cpl3_reach_nothing_of_the_host,
    ),
];

code! {
    // Makes the call that its registers hold, for ever.
    calls_for_ever: "2:" "syscall" "jmp 2b";
}

/// Where its pages are for CPL3. Linux has nothing there.
const BASE: u64 = 0x5000_0000_0000;

const CODE: usize = 0;
/// Two pages that are written, in one piece for CPL3.
const FIRST: usize = 1;
const SECOND: usize = 2;
/// It cannot be written.
const READ_ONLY: usize = 3;
/// CPL0's.
const SECRET: usize = 4;
const NOTHING: usize = 5;
/// Where the pages are in the process' memory: in another order, none behind its predecessor.
const PLACES: [usize; 5] = [3, 6, 1, 4, 0];

const EFAULT: i64 = -(libc::EFAULT as i64);
const WORD: u64 = 0x7365_6372_6574_7321;

/// The most that one call takes along.
const ROOM: usize = 256;
/// The most elements of an array of `struct iovec`.
const VECTORS: usize = 4;

/// Serves the calls of code at CPL3 in a page table of its own.
struct Served<'t> {
    thread: &'t Thread<'t>,
    context: UserContext,
    map: Map,
    /// Whose permissions a pointer needs.
    needs: Permissions,
}

fn at(page: usize, offset: usize) -> u64 {
    BASE + (page * PAGE + offset) as u64
}

impl<'t> Served<'t> {
    fn new(thread: &'t Thread<'t>, table: &PageTable) -> Self {
        let map = Map::at(0, 8 * PAGE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, 0);
        for page in 0..8 {
            map.write(page * PAGE, WORD);
        }
        let code = calls_for_ever();
        // SAFETY: A page of the map.
        unsafe { (map.page(PLACES[CODE]) as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        let user = Permissions::USER;
        let permissions = [
            user | Permissions::EXECUTE,
            user | Permissions::WRITE,
            user | Permissions::WRITE,
            user,
            Permissions::WRITE,
        ];
        for (page, permissions) in permissions.into_iter().enumerate() {
            let start = Gva::new(at(page, 0)).unwrap();
            let place = Hva::new(map.page(PLACES[page]) as u64).unwrap();
            table.map(start, PAGE as u64, place, permissions).unwrap().flush();
        }
        let mut context = UserContext::new(thread);
        context.registers_mut().rip = at(CODE, 0);
        Self {
            thread,
            context,
            map,
            needs: user,
        }
    }

    /// As the process has it.
    fn place(&self, page: usize, offset: usize) -> *mut u8 {
        (self.map.page(PLACES[page]) + offset) as *mut u8
    }

    /// Writes bytes where CPL3 has them, page by page.
    fn put(&self, page: usize, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let to = page * PAGE + offset + index;
            // SAFETY: In the map.
            unsafe { self.place(to / PAGE, to % PAGE).write_volatile(*byte) };
        }
    }

    fn get(&self, page: usize, offset: usize, bytes: usize) -> Vec<u8> {
        let byte = |from: usize| {
            // SAFETY: In the map.
            unsafe { self.place(from / PAGE, from % PAGE).read_volatile() }
        };
        (0..bytes).map(|index| byte(page * PAGE + offset + index)).collect()
    }

    /// A system call that CPL3 makes, and what it gets.
    #[track_caller]
    fn call(&mut self, number: i64, arguments: [u64; 4]) -> i64 {
        let r = self.context.registers_mut();
        (r.rax, r.rdi, r.rsi, r.rdx, r.r10) = (number as u64, arguments[0], arguments[1], arguments[2], arguments[3]);
        assert_eq!(self.context.run_for(self.thread, PLENTY), UserExit::Syscall);
        let (number, arguments) = self.context.system_call();
        self.serve(number as i64, arguments)
            .unwrap_or_else(|error| match error {
                BounceError::NotAllowed(_) => EFAULT,
                error => panic!("{error}"),
            })
    }

    fn serve(&self, number: i64, arguments: [u64; 6]) -> Result<i64, BounceError> {
        let [first, second, third, fourth, ..] = arguments;
        let mut buffer = [0u8; ROOM];
        match number {
            libc::SYS_write => {
                let bounce = self.bounce(second, third, Permissions::READ, &mut buffer)?;
                Ok(linux(number, [first, bounce.address(), third, 0]))
            }
            libc::SYS_read => {
                let bounce = self.bounce(second, third, Permissions::WRITE, &mut buffer)?;
                let result = linux(number, [first, bounce.address(), third, 0]);
                bounce.finish(result.max(0) as usize)?;
                Ok(result)
            }
            libc::SYS_openat => {
                let path = self.path(second, &mut buffer)?;
                Ok(linux(number, [first, path, third, fourth]))
            }
            libc::SYS_writev | libc::SYS_readv => self.vectors(number, first, second, third),
            _ => Ok(-i64::from(libc::ENOSYS)),
        }
    }

    fn bounce<'b>(
        &'b self,
        start: u64,
        bytes: u64,
        access: Permissions,
        buffer: &'b mut [u8],
    ) -> Result<Bounce<'b>, BounceError> {
        self.thread.bounce(start, bytes as usize, access | self.needs, buffer)
    }

    /// A path is as long as it is: byte by byte, so that nothing behind its end is asked for.
    fn path(&self, start: u64, buffer: &mut [u8; ROOM]) -> Result<u64, BounceError> {
        for index in 0..ROOM {
            let mut room = [0u8];
            let bounce = self.bounce(start.wrapping_add(index as u64), 1, Permissions::READ, &mut room)?;
            // SAFETY: What the bounce says is memory of the process, or the buffer.
            buffer[index] = unsafe { (bounce.address() as *const u8).read_volatile() };
            if buffer[index] == 0 {
                return Ok(buffer.as_ptr() as u64);
            }
        }
        Ok(buffer.as_ptr() as u64)
    }

    /// The array is copied, then each element bounced.
    fn vectors(&self, number: i64, fd: u64, start: u64, count: u64) -> Result<i64, BounceError> {
        let mut array = [0u8; VECTORS * 16];
        let bytes = count * 16;
        let bounce = self.bounce(start, bytes, Permissions::READ, &mut array)?;
        // SAFETY: What the bounce says is memory of the process, or the array.
        let copy = unsafe { std::slice::from_raw_parts(bounce.address() as *const u8, bytes as usize) }.to_vec();
        let mut rooms = [[0u8; ROOM]; VECTORS];
        let mut bounces = Vec::new();
        let access = if number == libc::SYS_readv {
            Permissions::WRITE
        } else {
            Permissions::READ
        };
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        for (element, room) in copy.chunks(16).zip(&mut rooms) {
            let (base, bytes) = (word(&element[..8]), word(&element[8..]));
            bounces.push((self.bounce(base, bytes, access, room)?, bytes));
        }
        let linux_array: Vec<u64> = bounces
            .iter()
            .flat_map(|(bounce, bytes)| [bounce.address(), *bytes])
            .collect();
        let result = linux(number, [fd, linux_array.as_ptr() as u64, count, 0]);
        let mut left = result.max(0) as u64;
        if number == libc::SYS_readv {
            for (bounce, bytes) in bounces {
                let written = bytes.min(left);
                bounce.finish(written as usize)?;
                left -= written;
            }
        }
        Ok(result)
    }
}

fn linux(number: i64, arguments: [u64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: Pointers are what a bounce gave, or none of Linux', and refused.
    let result = unsafe { libc::syscall(number, a, b, c, d) };
    if result == -1 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        result
    }
}

fn pipe() -> [u64; 2] {
    let mut ends = [0; 2];
    // SAFETY: Two ends of a pipe.
    assert_eq!(
        unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) },
        0
    );
    ends.map(|end| end as u64)
}

fn vector(elements: &[(u64, u64)]) -> Vec<u8> {
    let words = elements.iter().flat_map(|(base, bytes)| [*base, *bytes]);
    words.flat_map(u64::to_le_bytes).collect()
}

/// Runs it with code at CPL3 whose page table is loaded.
fn with_served(body: impl FnOnce(&mut Served<'_>, [u64; 2])) {
    let ends = pipe();
    let dune = enter();
    let thread = dune.thread();
    let table = thread.new_page_table().unwrap();
    let mut served = Served::new(&thread, &table);
    // SAFETY: It maps all that the default table does.
    unsafe { thread.load(&table) };
    body(&mut served, ends);
    // SAFETY: The default one.
    unsafe { thread.load(&thread.address_space()) };
    drop(served);
    dune.leave();
}

fn pointers_of_cpl3_are_bounced() {
    with_served(|served, [reads, writes]| {
        let over = at(FIRST, PAGE - 8);
        served.put(FIRST, PAGE - 8, b"a piece, another");
        // Linux has nothing there: it takes no pointer as it is.
        assert_eq!(linux(libc::SYS_write, [writes, over, 16, 0]), EFAULT);
        // Both pages, which are not neighbours, come and go.
        assert_eq!(served.call(libc::SYS_write, [writes, over, 16, 0]), 16);
        let mut seen = [0u8; 16];
        assert_eq!(linux(libc::SYS_read, [reads, seen.as_mut_ptr() as u64, 16, 0]), 16);
        assert_eq!(&seen, b"a piece, another");
        assert_eq!(
            linux(libc::SYS_write, [writes, b"one way and back".as_ptr() as u64, 16, 0]),
            16
        );
        assert_eq!(served.call(libc::SYS_read, [reads, over, 20, 0]), 16);
        assert_eq!(served.get(FIRST, PAGE - 8, 16), b"one way and back");
        // No more than Linux wrote.
        assert_eq!(served.get(SECOND, 8, 8), [0; 8]);
        assert_eq!(
            served.call(libc::SYS_read, [reads, over, 20, 0]),
            -i64::from(libc::EAGAIN)
        );
        assert_eq!(served.get(FIRST, PAGE - 8, 16), b"one way and back");
        // In one page: where it is.
        assert_eq!(served.call(libc::SYS_write, [writes, at(READ_ONLY, 0), 8, 0]), 8);
        assert_eq!(served.call(libc::SYS_read, [reads, at(SECOND, 100), 8, 0]), 8);
        assert_eq!(served.get(SECOND, 100, 8), WORD.to_le_bytes());
        // A path over two pages, and one that ends with its page, behind which nothing is CPL3's.
        let at_cwd = libc::AT_FDCWD as u64;
        for (page, offset) in [(FIRST, PAGE - 6), (READ_ONLY, PAGE - 14)] {
            served.put(page, offset, b"/proc/version\0");
            let fd = served.call(libc::SYS_openat, [at_cwd, at(page, offset), libc::O_RDONLY as u64, 0]);
            assert!(fd >= 0, "{fd}");
            assert_eq!(served.call(libc::SYS_read, [fd as u64, over, 14, 0]), 14);
            assert_eq!(served.get(FIRST, PAGE - 8, 14), b"Linux version ");
            // SAFETY: CPL3's, which has no use for it any more.
            unsafe { libc::close(fd as i32) };
        }
        // An array over two pages, with an element that is, too.
        let array = at(FIRST, PAGE - 24);
        served.put(SECOND, 200, b"four");
        served.put(READ_ONLY, 8, b"abc");
        served.put(SECOND, PAGE - 5, b"five, five");
        let elements = [(at(SECOND, 200), 4), (at(READ_ONLY, 8), 3), (at(SECOND, PAGE - 5), 10)];
        served.put(FIRST, PAGE - 24, &vector(&elements));
        assert_eq!(served.call(libc::SYS_writev, [writes, array, 3, 0]), 17);
        let mut seen = [0u8; 17];
        assert_eq!(linux(libc::SYS_read, [reads, seen.as_mut_ptr() as u64, 17, 0]), 17);
        assert_eq!(&seen, b"fourabcfive, five");
        // And in: the array itself lies where nothing is written.
        let array = at(SECOND, 1000);
        served.put(
            SECOND,
            1000,
            &vector(&[(over, 12), (at(SECOND, 300), 3), (at(SECOND, 400), 9)]),
        );
        assert_eq!(
            linux(
                libc::SYS_write,
                [writes, b"scattered bytes, some".as_ptr() as u64, 21, 0]
            ),
            21
        );
        assert_eq!(served.call(libc::SYS_readv, [reads, array, 3, 0]), 21);
        assert_eq!(served.get(FIRST, PAGE - 8, 12), b"scattered by");
        assert_eq!(served.get(SECOND, 300, 4), b"tes\0");
        assert_eq!(served.get(SECOND, 400, 9), b", some\0\0\0");
    });
}

fn pointers_of_cpl3_reach_nothing_of_the_host() {
    with_served(|served, [reads, writes]| {
        let own = WORD;
        let bad = [
            at(SECRET, 0),
            // Its first half is CPL3's.
            at(READ_ONLY, PAGE - 4),
            at(NOTHING, 0),
            // Where the process has that page, and its stack.
            served.place(SECRET, 0) as u64,
            &raw const own as u64,
            0,
            1 << 63,
            u64::MAX - 3,
        ];
        let at_cwd = libc::AT_FDCWD as u64;
        served.put(READ_ONLY, PAGE - 4, b"none");
        for pointer in bad {
            assert_eq!(
                served.call(libc::SYS_write, [writes, pointer, 8, 0]),
                EFAULT,
                "{pointer:#x}"
            );
            let opened = served.call(libc::SYS_openat, [at_cwd, pointer, 0, 0]);
            assert_eq!(opened, EFAULT, "{pointer:#x}");
            assert_eq!(
                served.call(libc::SYS_writev, [writes, pointer, 1, 0]),
                EFAULT,
                "{pointer:#x}"
            );
            served.put(SECOND, 0, &vector(&[(at(FIRST, 0), 8), (pointer, 8)]));
            let written = served.call(libc::SYS_writev, [writes, at(SECOND, 0), 2, 0]);
            assert_eq!(written, EFAULT, "{pointer:#x}");
        }
        // Nothing went out.
        let mut seen = [0u8; 8];
        let left = [reads, seen.as_mut_ptr() as u64, 8, 0];
        assert_eq!(linux(libc::SYS_read, left), -i64::from(libc::EAGAIN));
        // Nor in, and it waits for who may have it. What CPL3 may only read is not written either.
        assert_eq!(linux(libc::SYS_write, [writes, b"eight by".as_ptr() as u64, 8, 0]), 8);
        for pointer in bad
            .into_iter()
            .chain([at(READ_ONLY, 0), at(CODE, 0), at(SECOND, PAGE - 4)])
        {
            assert_eq!(
                served.call(libc::SYS_read, [reads, pointer, 8, 0]),
                EFAULT,
                "{pointer:#x}"
            );
            served.put(SECOND, 0, &vector(&[(at(FIRST, 0), 8), (pointer, 8)]));
            let got = served.call(libc::SYS_readv, [reads, at(SECOND, 0), 2, 0]);
            assert_eq!(got, EFAULT, "{pointer:#x}");
        }
        assert_eq!(served.call(libc::SYS_read, [reads, at(FIRST, 64), 8, 0]), 8);
        assert_eq!(served.get(FIRST, 64, 8), b"eight by");
        assert_eq!(served.get(FIRST, 0, 8), WORD.to_le_bytes());
        assert_eq!(served.get(SECRET, 0, 8), WORD.to_le_bytes());
        assert_eq!(served.get(READ_ONLY, 0, 8), WORD.to_le_bytes());
        assert_eq!(own, WORD);
        // What keeps CPL3 out is the bit that the host asks for: who does not is its deputy.
        served.needs = Permissions::NONE;
        assert_eq!(served.call(libc::SYS_write, [writes, at(SECRET, 0), 8, 0]), 8);
        assert_eq!(linux(libc::SYS_read, left), 8);
        assert_eq!(u64::from_le_bytes(seen), WORD);
    });
}

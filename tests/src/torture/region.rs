// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of which a model is kept: what each page holds, and what may be done with it.

use std::io;

use crate::fuzz::Random;
use crate::support::load;
use crate::support::store;
use crate::support::GIB;
use crate::support::PAGE;

/// A region has two homes, so that it can move, each in a GiB of its own, where Linux maps nothing by itself.
const HOME: usize = GIB;
const ARENA: usize = 0x1000_0000_0000;

/// Words of a page that are looked at before all others, by accesses that may fault.
const WORDS: [usize; 3] = [0, 255, 510];

/// The last word of a page, which [`touch`] writes whoever has the region; the model knows nothing of it.
const SCRATCH: usize = 511;

const READ: i32 = libc::PROT_READ;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

#[derive(Clone, Copy, Debug)]
struct Page {
    mapped: bool,
    protection: i32,
    value: u64,
    /// Linux may drop the value when it likes.
    lazily_freed: bool,
}

impl Page {
    const FRESH: Self = Self {
        mapped: true,
        protection: READ_WRITE,
        value: 0,
        lazily_freed: false,
    };

    fn is_readable(&self) -> bool {
        self.mapped && self.protection & libc::PROT_READ != 0
    }

    fn is_writable(&self) -> bool {
        self.mapped && self.protection & libc::PROT_WRITE != 0
    }

    /// Whether the page may hold this; all words at once first, which is quick.
    fn first_difference(&self, seen: &[u64; SCRATCH]) -> Option<usize> {
        let differing = |(word, seen): (usize, &u64)| seen ^ word_of(self.value, word);
        if seen.iter().enumerate().map(differing).fold(0, std::ops::BitOr::bitor) == 0 {
            return None;
        }
        (0..SCRATCH).find(|word| !self.may_hold(*word, seen[*word]))
    }

    fn may_hold(&self, word: usize, seen: u64) -> bool {
        seen == word_of(self.value, word) || self.lazily_freed && seen == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Private,
    Shared,
    /// A shared mapping of a memfd.
    File(i32),
}

pub struct Region {
    /// Which of the arena's.
    number: usize,
    home: usize,
    kind: Kind,
    pages: Vec<Page>,
    /// Pages of the file.
    file_pages: usize,
}

type Result = std::result::Result<(), String>;

/// Whether there was anything to do it to.
type Done = std::result::Result<bool, String>;

const ADVICE: [(i32, &str); 10] = [
    (libc::MADV_DONTNEED, "MADV_DONTNEED"),
    (libc::MADV_FREE, "MADV_FREE"),
    (libc::MADV_PAGEOUT, "MADV_PAGEOUT"),
    (libc::MADV_COLD, "MADV_COLD"),
    (libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
    (libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE"),
    (libc::MADV_MERGEABLE, "MADV_MERGEABLE"),
    (libc::MADV_UNMERGEABLE, "MADV_UNMERGEABLE"),
    (libc::MADV_COLLAPSE, "MADV_COLLAPSE"),
    (libc::MADV_POPULATE_READ, "MADV_POPULATE_READ"),
];

/// What is in a page that is not zero names it: the region in 8 bits, the page in 16, then what the model or chance says.
fn label(region: usize, page: usize) -> u64 {
    (region as u64 + 1) | (page as u64) << 8
}

/// A value for a page, not zero.
fn some_value(region: usize, page: usize, random: &mut Random) -> u64 {
    random.next() << 24 | label(region, page)
}

/// A word of a page that holds a value: no two are the same.
fn word_of(value: u64, word: usize) -> u64 {
    if value == 0 {
        0
    } else {
        value.wrapping_add((word as u64) << 24)
    }
}

/// Whether a word may be in this page at all, whatever has been written there.
fn belongs(seen: u64, region: usize, page: usize) -> bool {
    seen == 0 || seen & 0xff_ffff == label(region, page)
}

/// Reads and writes, again and again, in a region that somebody else may unmap, move or write just now: nothing of another page
/// is seen there. False where there was no memory.
pub fn touch(region: usize, random: &mut Random) -> Done {
    (0..32).try_fold(false, |touched, _| Ok(touched | touch_once(region, random)?))
}

fn touch_once(region: usize, random: &mut Random) -> Done {
    let pages = if random.percent(70) { 64 } else { 1212 };
    let page = random.below(pages) as usize;
    let start = ARENA + (2 * region + random.below(2) as usize) * HOME + page * PAGE;
    let word = *random.pick(&[0, 255, 510, SCRATCH]);
    let write = random.percent(50);
    let stored = write && store(start + SCRATCH * 8, some_value(region, page, random)).is_ok();
    match load(start + word * 8) {
        Ok(seen) if belongs(seen, region, page) => Ok(true),
        Ok(seen) => Err(format!(
            "region {region}: word {word} of page {page} at {start:#x} is {seen:#x}"
        )),
        Err(_) => Ok(stored),
    }
}

/// What [`Region::act`] does, besides advice.
const ACTS: [&str; 10] = [
    "write",
    "munmap",
    "mmap",
    "mprotect",
    "mremap",
    "process_vm_writev",
    "ftruncate",
    "mlock",
    "new region",
    "look",
];

/// One of [`acts`], by how often each is done.
pub fn some_act(random: &mut Random) -> &'static str {
    match random.below(32) {
        0..8 => "write",
        8..10 => "munmap",
        10..13 => "mmap",
        13..17 => "mprotect",
        17 => "MADV_DONTNEED",
        18..22 => random.pick(&ADVICE).1,
        22 => "mremap",
        23..25 => "process_vm_writev",
        25 => "ftruncate",
        26 => "mlock",
        27 => "new region",
        _ => "look",
    }
}

/// All that [`Region::act`] does.
pub fn acts() -> impl Iterator<Item = &'static str> {
    ACTS.into_iter().chain(ADVICE.map(|(_, name)| name))
}

fn failed(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

/// Checks what a call says.
fn done(result: i32, what: &str) -> Result {
    if result == 0 {
        Ok(())
    } else {
        Err(failed(what))
    }
}

impl Region {
    pub fn new(number: usize, random: &mut Random) -> std::result::Result<Self, String> {
        let mut region = Self {
            number,
            home: 0,
            kind: Kind::Private,
            pages: Vec::new(),
            file_pages: 0,
        };
        region.renew(random)?;
        Ok(region)
    }

    /// Starts anew with another size and kind.
    fn renew(&mut self, random: &mut Random) -> Result {
        self.clear()?;
        let pages = match random.below(4) {
            0 => 1 + random.below(4),
            1 | 2 => 1 + random.below(64),
            _ => 512 + random.below(700),
        } as usize;
        self.kind = match random.below(4) {
            0 => Kind::Shared,
            1 => {
                // SAFETY: a new file.
                let file = unsafe { libc::memfd_create(c"torture".as_ptr(), libc::MFD_CLOEXEC) };
                if file < 0 {
                    return Err(failed("memfd_create"));
                }
                // SAFETY: our own file.
                done(unsafe { libc::ftruncate(file, (pages * PAGE) as i64) }, "ftruncate")?;
                self.file_pages = pages;
                Kind::File(file)
            }
            _ => Kind::Private,
        };
        self.map(0, pages)?;
        self.pages = vec![Page::FRESH; pages];
        Ok(())
    }

    fn clear(&mut self) -> Result {
        // SAFETY: nobody else's memory is there.
        done(
            unsafe { libc::munmap(self.start() as *mut _, HOME) },
            "munmap of a home",
        )?;
        if let Kind::File(file) = self.kind {
            // SAFETY: our own file, forgotten below.
            unsafe { libc::close(file) };
        }
        self.kind = Kind::Private;
        self.pages.clear();
        Ok(())
    }

    fn start(&self) -> usize {
        ARENA + (2 * self.number + self.home) * HOME
    }

    fn address(&self, page: usize) -> usize {
        self.start() + page * PAGE
    }

    fn map(&self, first: usize, count: usize) -> Result {
        let (flags, fd) = match self.kind {
            Kind::Private => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
            Kind::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
            Kind::File(fd) => (libc::MAP_SHARED, fd),
        };
        let at = self.address(first) as *mut libc::c_void;
        let offset = if fd < 0 { 0 } else { (first * PAGE) as i64 };
        // SAFETY: fails where something is.
        let got = unsafe {
            let flags = flags | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
            libc::mmap(at, count * PAGE, READ_WRITE, flags, fd, offset)
        };
        if got == at {
            Ok(())
        } else {
            Err(failed("mmap"))
        }
    }

    /// What is behind the end of its file is SIGBUS to touch.
    fn is_behind_the_end(&self, page: usize) -> bool {
        matches!(self.kind, Kind::File(_)) && page >= self.file_pages
    }

    /// Behind the end of its file, but in the same 2 MiB of it: where MADV_COLLAPSE made a huge page of them, Linux maps it as
    /// a whole, and nothing of it is SIGBUS, which it looks for at faults only.
    fn may_be_in_the_last_huge_page(&self, page: usize) -> bool {
        const PAGES: usize = (2 << 20) / PAGE;
        self.is_behind_the_end(page) && self.file_pages > 0 && page / PAGES == (self.file_pages - 1) / PAGES
    }

    /// Compares all of a page with the model.
    pub fn check(&mut self, number: usize) -> Result {
        let page = self.pages[number];
        let expected = page.is_readable() && !self.is_behind_the_end(number);
        for word in WORDS {
            match load(self.address(number) + word * 8) {
                Ok(value) if expected && page.may_hold(word, value) => {}
                Err(_) if !expected => {}
                Ok(0) if page.is_readable() && self.may_be_in_the_last_huge_page(number) => {}
                seen => {
                    return Err(self.differs(number, word, &format!("{seen:x?}")));
                }
            }
        }
        if !expected {
            return Ok(());
        }
        let mut seen = [0u64; SCRATCH];
        // SAFETY: memory of this region, mapped and readable as was just seen; who has the region changes that, and these words.
        unsafe { seen.as_mut_ptr().copy_from(self.address(number) as *const u64, SCRATCH) };
        if let Some(word) = page.first_difference(&seen) {
            return Err(self.differs(number, word, &format!("{:#x}", seen[word])));
        }
        match load(self.address(number) + SCRATCH * 8) {
            Ok(seen) if belongs(seen, self.number, number) => Ok(()),
            seen => Err(self.differs(number, SCRATCH, &format!("{seen:x?}"))),
        }
    }

    fn differs(&self, number: usize, word: usize, seen: &str) -> String {
        format!(
            "region {} ({:?}) at {:#x}: word {word} of page {number} of {}: {seen}, the model says {:x?}, file of {} pages",
            self.number,
            self.kind,
            self.start(),
            self.pages.len(),
            self.pages[number],
            self.file_pages
        )
    }

    pub fn check_all(&mut self) -> Result {
        (0..self.pages.len()).try_for_each(|page| self.check(page))
    }

    fn write(&mut self, number: usize, value: u64) -> Result {
        let page = self.pages[number];
        if self.may_be_in_the_last_huge_page(number) {
            // It may arrive where nobody keeps it.
            return Ok(());
        }
        let expected = page.is_writable() && !self.is_behind_the_end(number);
        for word in WORDS {
            let result = store(self.address(number) + word * 8, word_of(value, word));
            if result.is_ok() != expected {
                return Err(format!(
                    "region {} ({:?}): write to word {word} of page {number}: {result:?}, the model says {page:x?}",
                    self.number, self.kind
                ));
            }
        }
        if expected {
            for word in 0..SCRATCH {
                // SAFETY: memory of this region, mapped and writable as was just seen; nobody else changes that.
                unsafe {
                    (self.address(number) as *mut u64)
                        .add(word)
                        .write_volatile(word_of(value, word))
                };
            }
            self.pages[number].value = value;
            self.pages[number].lazily_freed = false;
        }
        Ok(())
    }

    fn some_page(&self, random: &mut Random) -> usize {
        random.below(self.pages.len() as u64) as usize
    }

    /// A range of pages, often short.
    fn some_range(&self, random: &mut Random) -> (usize, usize) {
        let first = self.some_page(random);
        let room = (self.pages.len() - first) as u64;
        let count = if random.percent(70) { room.min(8) } else { room };
        (first, 1 + random.below(count) as usize)
    }

    /// A range of which every page is mapped.
    fn some_mapped_range(&self, random: &mut Random) -> Option<(usize, usize)> {
        let (first, count) = self.some_range(random);
        let mapped = self.pages[first..first + count]
            .iter()
            .take_while(|page| page.mapped)
            .count();
        (mapped > 0).then_some((first, mapped))
    }

    /// Does one of [`acts`] to it, and looks at some pages; false where there was nothing to do it to.
    pub fn act(&mut self, act: &str, random: &mut Random) -> Done {
        let done = match act {
            "write" => self.write_some(random).map(|()| true),
            "munmap" => self.unmap(random),
            "mmap" => self.map_again(random),
            "mprotect" => self.protect(random),
            "mremap" => self.relocate(),
            "process_vm_writev" => self.write_from_outside(random),
            "ftruncate" => self.truncate(random),
            "mlock" => self.lock_some(random),
            "new region" => self.renew(random).map(|()| true),
            "look" => Ok(true),
            advice => self.advise(advice, random),
        }?;
        for _ in 0..4 {
            let page = self.some_page(random);
            self.check(page).map_err(|error| format!("after {act}: {error}"))?;
        }
        Ok(done)
    }

    pub fn write_some(&mut self, random: &mut Random) -> Result {
        let (first, count) = self.some_range(random);
        (first..first + count.min(16)).try_for_each(|page| self.write(page, some_value(self.number, page, random)))
    }

    fn unmap(&mut self, random: &mut Random) -> Done {
        let (first, count) = self.some_range(random);
        // SAFETY: a piece of this region.
        let result = unsafe { libc::munmap(self.address(first) as *mut _, count * PAGE) };
        done(result, "munmap")?;
        let was_mapped = self.pages[first..first + count].iter().any(|page| page.mapped);
        self.pages[first..first + count]
            .iter_mut()
            .for_each(|page| page.mapped = false);
        self.check(first).map(|()| was_mapped)
    }

    /// Fills a hole.
    fn map_again(&mut self, random: &mut Random) -> Done {
        let from = self.some_page(random);
        let Some(first) = (from..self.pages.len()).find(|page| !self.pages[*page].mapped) else {
            return Ok(false);
        };
        let hole = self.pages[first..].iter().take_while(|page| !page.mapped).count();
        let count = 1 + random.below(hole as u64) as usize;
        self.map(first, count)?;
        for page in first..first + count {
            let old = self.pages[page];
            self.pages[page] = Page {
                // A file still has it.
                value: if matches!(self.kind, Kind::File(_)) {
                    old.value
                } else {
                    0
                },
                ..Page::FRESH
            };
        }
        self.check(first).map(|()| true)
    }

    fn protect(&mut self, random: &mut Random) -> Done {
        let Some((first, count)) = self.some_mapped_range(random) else {
            return Ok(false);
        };
        let protection = *random.pick(&[libc::PROT_NONE, READ, READ, READ_WRITE, READ_WRITE, READ_WRITE]);
        // SAFETY: a piece of this region.
        let result = unsafe { libc::mprotect(self.address(first) as *mut _, count * PAGE, protection) };
        done(result, "mprotect")?;
        self.pages[first..first + count]
            .iter_mut()
            .for_each(|page| page.protection = protection);
        self.check(first)?;
        let last = first + count - 1;
        self.write(last, some_value(self.number, last, random)).map(|()| true)
    }

    fn advise(&mut self, name: &str, random: &mut Random) -> Done {
        let known = ADVICE.iter().find(|(_, known)| *known == name);
        let (advice, _) = *known.ok_or_else(|| format!("there is no {name}"))?;
        let Some((first, count)) = self.some_mapped_range(random) else {
            return Ok(false);
        };
        let whole = advice == libc::MADV_HUGEPAGE || advice == libc::MADV_COLLAPSE;
        let (first, count) = if whole { (0, self.pages.len()) } else { (first, count) };
        // SAFETY: a piece of this region.
        let result = unsafe { libc::madvise(self.address(first) as *mut _, count * PAGE, advice) };
        // What is only advice Linux may decline; what changes contents it has to do.
        let private = self.kind == Kind::Private;
        match advice {
            libc::MADV_DONTNEED => done(result, "MADV_DONTNEED")?,
            libc::MADV_FREE if private => done(result, "MADV_FREE")?,
            _ => {}
        }
        for page in &mut self.pages[first..first + count] {
            match advice {
                libc::MADV_DONTNEED if private => (page.value, page.lazily_freed) = (0, false),
                libc::MADV_FREE if private => page.lazily_freed = true,
                _ => {}
            }
        }
        self.check(first)?;
        Ok(result == 0)
    }

    /// Moves all of it to its other home, where it is one mapping.
    fn relocate(&mut self) -> Done {
        if self
            .pages
            .iter()
            .any(|page| !page.mapped || page.protection != READ_WRITE)
        {
            return Ok(false);
        }
        let (bytes, old) = (self.pages.len() * PAGE, self.start());
        self.home ^= 1;
        let new = self.start() as *mut libc::c_void;
        // SAFETY: to a place that is empty and its own.
        let got = unsafe {
            libc::mremap(
                old as *mut _,
                bytes,
                bytes,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                new,
            )
        };
        if got != new {
            // Not one mapping for Linux: pages that were mapped again do not merge with pages that were written before.
            self.home ^= 1;
            return Ok(false);
        }
        if load(old).is_ok() || load(old + bytes - 8).is_ok() {
            return Err(format!("region {}: readable where it was before mremap", self.number));
        }
        Ok(true)
    }

    /// By what another process would use.
    fn write_from_outside(&mut self, random: &mut Random) -> Done {
        let page = self.some_page(random);
        let value = some_value(self.number, page, random);
        let words: [u64; SCRATCH] = std::array::from_fn(|word| word_of(value, word));
        let local = libc::iovec {
            iov_base: words.as_ptr().cast_mut().cast(),
            iov_len: size_of_val(&words),
        };
        let remote = libc::iovec {
            iov_base: self.address(page) as *mut _,
            iov_len: size_of_val(&words),
        };
        // SAFETY: writes to this region or fails.
        let wrote = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
        let expected = self.pages[page].is_writable() && !self.is_behind_the_end(page);
        if (wrote == size_of_val(&words) as isize) != expected {
            let what = format!("process_vm_writev to page {page} ({:x?}): {wrote}", self.pages[page]);
            return Err(failed(&what));
        }
        if !expected {
            return Ok(true);
        }
        self.pages[page].value = value;
        self.pages[page].lazily_freed = false;
        self.check(page).map(|()| true)
    }

    fn truncate(&mut self, random: &mut Random) -> Done {
        let Kind::File(file) = self.kind else {
            return Ok(false);
        };
        let pages = random.below(self.pages.len() as u64 + 1) as usize;
        // SAFETY: our own file.
        done(unsafe { libc::ftruncate(file, (pages * PAGE) as i64) }, "ftruncate")?;
        // What is cut off is gone, what is added is zero.
        let from = pages.min(self.file_pages);
        self.file_pages = pages;
        self.pages[from..].iter_mut().for_each(|page| page.value = 0);
        let last = self.pages.len() - 1;
        self.check(last)?;
        self.check(pages.saturating_sub(1)).map(|()| true)
    }

    /// Limits may forbid it.
    fn lock_some(&mut self, random: &mut Random) -> Done {
        let Some((first, count)) = self.some_mapped_range(random) else {
            return Ok(false);
        };
        let address = self.address(first) as *const libc::c_void;
        // SAFETY: a piece of this region.
        let locked = unsafe {
            let locked = libc::mlock(address, count.min(8) * PAGE);
            libc::munlock(address, count * PAGE);
            locked == 0
        };
        self.check(first).map(|()| locked)
    }

    /// What a child of fork finds and does: the same memory; its writes are its own, except to what is shared.
    pub fn visit_as_child(&mut self, seed: u64) -> Result {
        self.check_all()?;
        let mut random = Random::new(seed);
        self.write_some(&mut random)?;
        self.check_all()
    }

    /// What [`Self::visit_as_child`] with the same seed left behind.
    pub fn after_child(&mut self, seed: u64) {
        if self.kind == Kind::Private {
            return;
        }
        let mut random = Random::new(seed);
        let (first, count) = self.some_range(&mut random);
        for page in first..first + count.min(16) {
            let value = some_value(self.number, page, &mut random);
            if self.pages[page].is_writable() && !self.is_behind_the_end(page) {
                self.pages[page].value = value;
            }
        }
    }
}

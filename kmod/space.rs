// SPDX-License-Identifier: GPL-2.0

//! The space: what an open file of the device is. One process' address space, its EPT, its vCPUs; a process has one, which
//! all files that it opens share.

mod show;

pub(crate) use self::show::List;

use crate::abi;
use crate::arch::addr::Gpa;
use crate::arch::addr::Hva;
use crate::arch::controls::VmxCapabilities;
use crate::counters;
use crate::counters::Counted;
use crate::ept::fault::Ept;
use crate::ept::fault::Traits;
use crate::ept::host_walk::Format;
use crate::limits::Charge;
use crate::limits::Kind;
use crate::sys::cpu;
use crate::sys::lock::Class;
use crate::sys::lock::SpinLock;
use crate::sys::mem::Zeroed;
use crate::sys::mem::ZeroedSlice;
use crate::sys::mm;
use crate::sys::mm::Mm;
use crate::sys::mm::Notifier;
use crate::sys::mm::NotifierOps;
use crate::sys::module;
use crate::sys::thread;
use crate::sys::thread::Pending;
use crate::sys::thread::TaskId;
use crate::sys::trace;
use crate::vcpu::Vcpu;
use crate::vmx::capability;
use crate::vmx::guest_state::Cr4Policy;
use crate::vmx::owner;
use crate::vmx::setup::MsrBitmap;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ops::Range;
use core::ptr::null_mut;
use core::ptr::NonNull;
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::Ordering::Release;
use kernel::prelude::*;

/// Narrowest and widest GPA that the module handles; 4-level EPT ends at 48 bits.
const GPA_BITS: core::ops::RangeInclusive<u32> = 32..=48;

static SPACES_MADE: AtomicU64 = AtomicU64::new(0);

/// A process' space.
///
/// Lives in a `KBox` that does not move: from [`Space::get`] of the first file until, after [`Space::put`] of the last,
/// no callback of the notifier runs any more.
#[repr(C)]
pub(crate) struct Space {
    /// First: the kernel hands us its address.
    notifier: Notifier,
    pub(crate) mm: Mm,
    /// vCPUs by number.
    places: ZeroedSlice<Place>,
    /// Its lock is taken to change `places`.
    vcpus: SpinLock<Places>,
    pub(crate) ept: Ept,
    pub(crate) msr_bitmap: MsrBitmap,
    pub(crate) cr4: Cr4Policy,
    pub(crate) capabilities: VmxCapabilities,
    /// Linux' own.
    pub(crate) host_lstar: u64,
    /// No other space had or will have it; not 0.
    pub(crate) number: u64,
    /// Of the process that made it.
    pid: u32,
    /// What vCPUs counted that are gone, as in [`abi::Counters`].
    past: ZeroedSlice<AtomicU64>,
    gpa_bits: u32,
    traits: Traits,
    /// What goes with the last file, before the notifier's callbacks end. Used by `get` and `put` only.
    held: UnsafeCell<Option<Held>>,
    /// Files that there are, and the next space in the registry: under its lock.
    files: UnsafeCell<usize>,
    next: UnsafeCell<*mut Space>,
}

/// What a space has as long as it has a file.
struct Held {
    _usage: owner::Use,
    _charge: Charge,
    _counted: Counted,
}

// SAFETY: The cells are used as their comments say.
unsafe impl Sync for Space {}
// SAFETY: As above.
unsafe impl Send for Space {}

/// Spaces that have a file, by the address of their mm.
///
/// # Invariants
///
/// Each of the lists holds spaces whose count of files is not 0, at most one of each mm.
struct Registry([*mut Space; Self::LISTS]);

// SAFETY: What it points to is used under its lock.
unsafe impl Send for Registry {}

static REGISTRY: SpinLock<Registry> = SpinLock::new(Registry([null_mut(); Registry::LISTS]));

/// Spaces whose memory was not freed yet.
static UNFREED: AtomicUsize = AtomicUsize::new(0);

impl Registry {
    const LISTS: usize = 256;

    fn list(&mut self, mm: Mm) -> &mut *mut Space {
        &mut self.0[mm.hash() % Self::LISTS]
    }

    /// The space of `mm`, with one file more.
    fn get(&mut self, mm: Mm) -> Option<NonNull<Space>> {
        let mut at = *self.list(mm);
        while let Some(space) = NonNull::new(at) {
            // SAFETY: By the invariant it is alive, and the lock is held.
            unsafe {
                if space.as_ref().mm == mm {
                    *space.as_ref().files.get() += 1;
                    return Some(space);
                }
                at = *space.as_ref().next.get();
            }
        }
        None
    }

    /// Takes in a space with its first file; there is none of its mm.
    fn add(&mut self, space: NonNull<Space>) {
        // SAFETY: The caller's, who holds the lock.
        let this = unsafe { space.as_ref() };
        let list = self.list(this.mm);
        // SAFETY: As above. INVARIANT: It has one file, and its mm no other space.
        unsafe {
            *this.files.get() = 1;
            *this.next.get() = *list;
        }
        *list = space.as_ptr();
    }

    /// One file less; true: that was the last, and the space is in the registry no more.
    fn put(&mut self, space: NonNull<Space>) -> bool {
        // SAFETY: By the invariant everything in the lists is alive; the lock is held.
        unsafe {
            let files = space.as_ref().files.get();
            *files -= 1;
            if *files != 0 {
                return false;
            }
            let mut link: *mut *mut Space = self.list(space.as_ref().mm);
            while *link != space.as_ptr() {
                link = (**link).next.get();
            }
            *link = *space.as_ref().next.get();
        }
        true
    }
}

/// To be called once, before any space is made.
pub(crate) fn init() {
    // SAFETY: A static, and nobody uses it yet.
    unsafe { REGISTRY.init(Class::Registry) };
}

/// When dropped, which is when no file is left, waits until every space was freed: the module goes away.
pub(crate) struct Drain;

impl Drop for Drain {
    fn drop(&mut self) {
        mm::wait_for_frees(&UNFREED);
    }
}

/// A vCPU's place. Written under the space's `vcpus` lock; its owner reads it without.
struct Place {
    /// Null where the place is free. Only the task that stands here uses or frees `vcpu`, while it lives: so a task that
    /// finds itself here finds a vCPU that stays until it destroys it itself.
    owner: AtomicPtr<c_void>,
    vcpu: AtomicPtr<Vcpu>,
}

// SAFETY: Null pointers are values.
unsafe impl Zeroed for Place {}

/// About all places of a space.
struct Places {
    /// How many are taken.
    count: u32,
    /// Where the search for abandoned vCPUs goes on.
    cursor: usize,
}

/// Places that are searched for abandoned vCPUs each time one is made.
const REAPED_AT_ONCE: usize = 8;

impl Space {
    /// The space of the calling process, for one more file: the one that it has, or a new one. [`Space::put`] gives it back.
    ///
    /// # Errors
    ///
    /// EBUSY while KVM has VMX; EAGAIN where the user has as many spaces as one may have; ENOMEM; EINTR; EINVAL outside a
    /// process.
    pub(crate) fn get() -> Result<NonNull<Self>> {
        let mm = Mm::current().ok_or(EINVAL)?;
        if let Some(space) = REGISTRY.lock().get(mm) {
            return Ok(space);
        }
        // What is not needed in the end is dropped when the lock is free.
        let mut fresh = Some(Self::new(mm)?);
        mm.with_write_lock(|| {
            // Who else has the lock may have been quicker.
            if let Some(space) = REGISTRY.lock().get(mm) {
                return Ok(space);
            }
            if let Some(space) = &mut fresh {
                // SAFETY: What is in the box does not move from here on, and nobody else has it yet. `notifier` is its first
                // field, and `free` frees the box.
                unsafe { Notifier::register::<Self>(&mut space.notifier, mm)? };
            }
            let space = NonNull::from(KBox::leak(fresh.take().ok_or(EINVAL)?));
            UNFREED.fetch_add(1, Relaxed);
            REGISTRY.lock().add(space);
            Ok(space)
        })
    }

    /// A space of the calling process, whose notifier is not registered.
    fn new(mm: Mm) -> Result<KBox<Self>> {
        let charge = Charge::new(Kind::Spaces)?;
        let usage = owner::Use::new()?;
        let capabilities = usage.capabilities;
        let host_lstar = usage.host_lstar;
        let traits = Traits {
            accessed_dirty: capabilities.ept.accessed_dirty(),
            page_2m: capabilities.ept.page_2m(),
            execute_2m: !cpu::has_itlb_multihit(),
            format: Format::of_this_cpu(),
        };
        let gpa_bits = gpa_bits();
        let space = KBox::new(
            Self {
                notifier: Notifier::new(),
                mm,
                places: ZeroedSlice::new(max_vcpus() as usize)?,
                vcpus: SpinLock::new(Places { count: 0, cursor: 0 }),
                ept: Ept::new(gpa_bits, traits)?,
                msr_bitmap: MsrBitmap::new()?,
                cr4: Cr4Policy::new(&capabilities),
                capabilities,
                host_lstar,
                number: SPACES_MADE.fetch_add(1, Relaxed) + 1,
                pid: thread::current_pid(),
                past: ZeroedSlice::new(show::COUNTERS)?,
                gpa_bits,
                traits,
                held: UnsafeCell::new(Some(Held {
                    _usage: usage,
                    _charge: charge,
                    _counted: Counted::new(&counters::SPACES),
                })),
                files: UnsafeCell::new(0),
                next: UnsafeCell::new(null_mut()),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        // SAFETY: What is in the box does not move from here on, and nobody else has it yet.
        unsafe {
            space.vcpus.init(Class::Vcpus);
            space.ept.init();
        }
        Ok(space)
    }

    /// One file less; with the last all goes that the process, the user or the machine could miss. Does not wait for the
    /// notifier's callbacks: [`NotifierOps::free`] frees what they use.
    ///
    /// # Safety
    ///
    /// `this` comes from [`Space::get`], and is given back once for each time that it was given.
    pub(crate) unsafe fn put(this: NonNull<Self>) {
        if !REGISTRY.lock().put(this) {
            return;
        }
        // SAFETY: Nobody finds it any more but the notifier's callbacks, which do not free it before `put` below.
        let this = unsafe { this.as_ref() };
        let mut in_use = false;
        for place in this.places.iter() {
            // SAFETY: The last reference to the last file is gone, so nobody runs or frees it.
            in_use |= unsafe { place.vcpu.load(Relaxed).as_mut() }.is_some_and(|vcpu| vcpu.stop_waiting(this.mm));
        }
        if in_use {
            cpu::wait_for_interrupts();
        }
        for place in this.places.iter() {
            let vcpu = place.vcpu.swap(null_mut(), Relaxed);
            if !vcpu.is_null() {
                // SAFETY: The last reference to the last file is gone, so nobody runs it.
                drop(unsafe { KBox::from_raw(vcpu) });
            }
        }
        this.ept.kill();
        // SAFETY: No callback touches it.
        drop(unsafe { (*this.held.get()).take() });
        // SAFETY: Registered in `get`, and this is the last file.
        unsafe { this.notifier.put() };
    }

    /// What [`abi::DUNE_GET_INFO`] answers.
    pub(crate) fn info(&self) -> abi::Info {
        let capabilities = &self.capabilities;
        let mut caps = 0;
        for (has, bit) in [
            (self.traits.accessed_dirty, abi::CAP_EPT_AD),
            (self.traits.page_2m, abi::CAP_EPT_2M),
            (capabilities.ept.page_1g(), abi::CAP_EPT_1G),
            (capability::has_1g_pages(), abi::CAP_GUEST_1G),
            (cfg!(dune_count_ops), abi::CAP_COUNT_OPS),
        ] {
            if has {
                caps |= bit;
            }
        }
        abi::Info {
            size: core::mem::size_of::<abi::Info>() as u32,
            abi_version: abi::ABI_VERSION,
            capabilities: caps,
            gpa_bits: self.gpa_bits,
            max_vcpus: max_vcpus(),
            cr0_guest_owned: crate::arch::cr::CR0_GUEST_OWNED,
            cr4_guest_owned: self.cr4.owned,
            cr0: crate::sys::regs::cr0(),
            cr4: self.cr4.initial(),
            efer: crate::sys::regs::read_msr(crate::arch::msr::IA32_EFER).unwrap_or(0),
            slots_free: self.ept.slots_free(),
            vcpus: self.vcpus.lock().count,
        }
    }

    /// Makes a vCPU owned by the calling thread. ENOSPC, ENOMEM; ENXIO where the thread has selectors in DS, ES, FS or
    /// GS: a VM exit would load null there.
    pub(crate) fn create_vcpu(&self) -> Result<u32> {
        if crate::sys::regs::data_selectors() != 0 {
            return Err(ENXIO);
        }
        let charge = match Charge::new(Kind::Vcpus) {
            Err(e) if e == EAGAIN => {
                // Those of dead threads count, too.
                let mut reaped: [Option<KBox<Vcpu>>; REAPED_AT_ONCE] = [const { None }; REAPED_AT_ONCE];
                self.reap(&mut self.vcpus.lock(), &mut reaped, self.places.len());
                drop(reaped);
                Charge::new(Kind::Vcpus)?
            }
            charge => charge?,
        };
        let vcpu = Vcpu::new(self, charge)?;
        let mut reaped: [Option<KBox<Vcpu>>; REAPED_AT_ONCE] = [const { None }; REAPED_AT_ONCE];
        let mut places = self.vcpus.lock();
        let looked_at = if places.count as usize == self.places.len() {
            self.places.len()
        } else {
            REAPED_AT_ONCE
        };
        self.reap(&mut places, &mut reaped, looked_at);
        let number = self.places.iter().position(Place::is_free);
        if let Some(number) = number {
            places.count += 1;
            let place = &self.places[number];
            let owner = vcpu.owner();
            place.vcpu.store(KBox::into_raw(vcpu), Relaxed);
            place.owner.store(owner, Relaxed);
        }
        drop(places);
        // Clearing a VMCS asks another CPU and may sleep.
        drop(reaped);
        number.map(|number| number as u32).ok_or(ENOSPC)
    }

    /// Takes vCPUs whose owner will not run them again out of their places: all of them where no place is free, else a
    /// few, in turn, so that what died without saying so does not pile up.
    fn reap(&self, places: &mut Places, reaped: &mut [Option<KBox<Vcpu>>; REAPED_AT_ONCE], looked_at: usize) {
        let all = self.places.len();
        let mut taken = reaped.iter_mut();
        for _ in 0..looked_at.min(all) {
            let place = &self.places[places.cursor];
            places.cursor = (places.cursor + 1) % all;
            let vcpu = place.vcpu.load(Relaxed);
            // SAFETY: Under the lock what stands in a place is alive.
            if vcpu.is_null() || !unsafe { (*vcpu).is_abandoned(self.mm) } {
                continue;
            }
            let Some(to) = taken.next() else { return };
            // SAFETY: As above.
            self.count_past(unsafe { &*vcpu });
            place.owner.store(null_mut(), Relaxed);
            place.vcpu.store(null_mut(), Relaxed);
            places.count -= 1;
            // SAFETY: Taken out of its place; its owner is past running it.
            *to = Some(unsafe { KBox::from_raw(vcpu) });
        }
    }

    /// The place of the vCPU with that number, if it is the calling thread's. ENOENT, EPERM.
    fn find(&self, number: u64) -> Result<&Place> {
        self.find_of(thread::current_id(), number)
    }

    /// The same, of the thread that calls.
    #[inline(always)]
    fn find_of(&self, caller: TaskId, number: u64) -> Result<&Place> {
        let place = usize::try_from(number)
            .ok()
            .filter(|n| *n < self.places.len())
            // Masked, since user space chooses it and what stands there is followed.
            .and_then(|n| self.places.get(cpu::index_nospec(n, self.places.len())))
            .ok_or(ENOENT)?;
        let owner = place.owner.load(Relaxed);
        if owner == caller {
            Ok(place)
        } else if owner.is_null() {
            Err(ENOENT)
        } else {
            Err(EPERM)
        }
    }

    /// Calls `f` with the vCPU with that number, if this is the calling process' and it the calling thread's. EXDEV, ENOENT,
    /// EPERM.
    #[inline(always)]
    pub(crate) fn with_own_vcpu<R>(&self, number: u64, f: impl FnOnce(&mut Vcpu) -> Result<R>) -> Result<R> {
        let (caller, mm) = thread::caller();
        if mm != Some(self.mm) {
            return Err(EXDEV);
        }
        let vcpu = self.find_of(caller, number)?.vcpu.load(Relaxed);
        // SAFETY: As in `with_vcpu`.
        f(unsafe { &mut *vcpu })
    }

    /// Calls `f` with the vCPU with that number, if it is the calling thread's. ENOENT, EPERM.
    #[inline(always)]
    pub(crate) fn with_vcpu<R>(&self, number: u64, f: impl FnOnce(&mut Vcpu) -> Result<R>) -> Result<R> {
        let vcpu = self.find(number)?.vcpu.load(Relaxed);
        // SAFETY: The calling thread owns it and is here, so nobody else uses or destroys it.
        f(unsafe { &mut *vcpu })
    }

    /// ENOENT, EPERM.
    pub(crate) fn destroy_vcpu(&self, number: u64) -> Result {
        let place = self.find(number)?;
        let mut places = self.vcpus.lock();
        place.owner.store(null_mut(), Relaxed);
        let vcpu = place.vcpu.swap(null_mut(), Relaxed);
        places.count -= 1;
        // SAFETY: The owner's, who is here.
        self.count_past(unsafe { &*vcpu });
        drop(places);
        // SAFETY: Taken out of its place by its owner, who is here.
        drop(unsafe { KBox::from_raw(vcpu) });
        Ok(())
    }

    /// ENOSPC, ENOMEM; EINVAL for an address that no process has; EEXIST where the slot at `wanted` cannot be given.
    pub(crate) fn map_slot(&self, hva: u64, wanted: Option<u64>) -> Result<u64> {
        let hva = Hva::new(hva & !(abi::SLOT_BYTES - 1)).ok_or(EINVAL)?;
        let wanted = wanted.map(|gpa| Gpa::new(gpa).ok_or(EINVAL)).transpose()?;
        Ok(self.ept.map_slot(hva, wanted)?.as_u64())
    }

    /// The first slot behind that of `after` whose GiB has no mapping in the process: GPA and HVA. ENOENT; EINVAL for a GPA
    /// that there cannot be; EINTR.
    pub(crate) fn unused_slot(&self, after: u64) -> Result<(u64, u64)> {
        let mut at = Gpa::new(after).ok_or(EINVAL)?;
        while let Some((gpa, hva)) = self.ept.slot_behind(at) {
            if !self.mm.with_mappings(gib(hva), |is_mapped| is_mapped)? {
                return Ok((gpa.as_u64(), hva.as_u64()));
            }
            at = gpa;
            thread::reschedule();
            if thread::pending() == Pending::Signal {
                return Err(EINTR);
            }
        }
        Err(ENOENT)
    }

    /// Takes back the slot of a GiB without a mapping. EBUSY where it has one, ENOENT where it has no slot; EINVAL, EINTR.
    pub(crate) fn unmap_slot(&self, hva: u64) -> Result {
        let hva = Hva::new(hva & !(abi::SLOT_BYTES - 1)).ok_or(EINVAL)?;
        let had_one = self
            .mm
            .with_mappings(gib(hva), |is_mapped| (!is_mapped).then(|| self.ept.unmap_slot(hva)))?;
        match had_one {
            None => Err(EBUSY),
            Some(false) => Err(ENOENT),
            Some(true) => Ok(()),
        }
    }
}

/// The GiB that begins at `hva`.
fn gib(hva: Hva) -> Range<u64> {
    hva.as_u64()..hva.as_u64() + abi::SLOT_BYTES
}

impl Place {
    fn is_free(&self) -> bool {
        self.vcpu.load(Relaxed).is_null()
    }
}

impl NotifierOps for Space {
    fn release(&self) {
        self.ept.kill();
    }

    fn invalidate_start(&self, range: Range<u64>, may_sleep: bool) {
        let flushed = self.ept.invalidate_start(range.clone(), may_sleep);
        if trace::is_on(trace::Event::Invalidate) {
            trace::invalidate(self.number, range.start, range.end, flushed);
        }
    }

    fn invalidate_end(&self, _range: Range<u64>) {
        self.ept.invalidate_end();
    }

    fn young(&self, range: Range<u64>, clear: bool, flush: bool) -> bool {
        self.ept.young(range, clear, flush)
    }

    unsafe fn free(this: *mut Self) {
        // SAFETY: Leaked in `get`; by the caller nobody uses it any more. What could sleep went in `put`.
        drop(unsafe { KBox::from_raw(this) });
        // Last: the module may go when it is 0.
        UNFREED.fetch_sub(1, Release);
    }
}

/// Width of a GPA: the CPU's, or what the parameter says.
pub(crate) fn gpa_bits() -> u32 {
    let cpu = capability::max_physical_bits().min(*GPA_BITS.end());
    match module::param_gpa_bits() {
        0 => cpu,
        bits => bits.min(cpu),
    }
}

fn max_vcpus() -> u32 {
    module::param_max_vcpus()
}

/// Checks the module's parameters. EINVAL with a log line.
pub(crate) fn check_parameters() -> Result {
    let bits = module::param_gpa_bits();
    if bits != 0 && !GPA_BITS.contains(&bits) {
        pr_err!(
            "gpa_bits={} is not in {}..={}\n",
            bits,
            GPA_BITS.start(),
            GPA_BITS.end()
        );
        return Err(EINVAL);
    }
    let vcpus = module::param_max_vcpus();
    if !(1..=4096).contains(&vcpus) {
        pr_err!("max_vcpus={} is not in 1..=4096\n", vcpus);
        return Err(EINVAL);
    }
    Ok(())
}

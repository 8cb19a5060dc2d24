// SPDX-License-Identifier: MIT OR Apache-2.0

//! The same exits in a guest of KVM: answered in the kernel, and handed to user space and back.

use std::arch::global_asm;
use std::slice;

use dune_examples::ticks;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;

use crate::measure::System;
use crate::pages::Memory;
use crate::pages::PAGE;

type Error = Box<dyn std::error::Error>;

const CODE: usize = 0x8000;
/// Where the guest puts the ticks of each operation, 32 bits each.
const RESULTS: usize = 0x10_0000;
/// Pages that the guest's EPT has not, whether the host has them or not.
const PAGES_AT: usize = 0x20_0000;
const COUNT: usize = 1000;
/// Pages that are far enough from each other that one fault does not bring the next.
const STEP: usize = 16 * PAGE;
const BYTES: usize = PAGES_AT + (COUNT + 1) * STEP;

/// Done before the operations count.
const WARM_UP: usize = 16;

// In 32-bit mode without paging. EBP = operation, ESI = how often, EDI = where the results go, EBX = page to write,
// ECX = bytes to the next one.
global_asm!(
    ".pushsection .rodata.dune_bench_kvm, \"a\", @progbits",
    ".globl dune_bench_kvm_guest, dune_bench_kvm_guest_end",
    ".code32",
    "dune_bench_kvm_guest:",
    "2:",
    "cmp ebp, 1",
    "je 3f",
    "cmp ebp, 2",
    "je 4f",
    "cmp ebp, 3",
    "je 5f",
    // 0: nothing.
    "rdtsc",
    "mov [edi], eax",
    "rdtsc",
    "sub eax, [edi]",
    "jmp 6f",
    // 1: a hypercall that KVM does not know.
    "3: rdtsc",
    "mov [edi], eax",
    "mov eax, 0x7fffffff",
    "vmcall",
    "rdtsc",
    "sub eax, [edi]",
    "jmp 6f",
    // 2: CPUID.
    "4: push ebx",
    "rdtsc",
    "mov [edi], eax",
    "xor eax, eax",
    "xor ecx, ecx",
    "cpuid",
    "rdtsc",
    "sub eax, [edi]",
    "pop ebx",
    "jmp 6f",
    // 3: a page that the EPT lacks.
    "5: rdtsc",
    "mov [edi], eax",
    "mov byte ptr [ebx], 1",
    "rdtsc",
    "sub eax, [edi]",
    "add ebx, ecx",
    "6: mov [edi], eax",
    "add edi, 4",
    "dec esi",
    "jnz 2b",
    // Once more, untimed, for the answer, which goes behind the ticks; 0 where there is none.
    "xor eax, eax",
    "cmp ebp, 1",
    "jne 7f",
    "mov eax, 0x7fffffff",
    "vmcall",
    "7: cmp ebp, 2",
    "jne 8f",
    "xor ecx, ecx",
    "cpuid",
    "8: mov [edi], eax",
    // For ever: each OUT goes to user space.
    "9: out 0x10, al",
    "jmp 9b",
    "dune_bench_kvm_guest_end:",
    ".code64",
    ".popsection",
);

extern "C" {
    static dune_bench_kvm_guest: u8;
    static dune_bench_kvm_guest_end: u8;
}

/// What a hypercall that KVM does not know gives: -KVM_ENOSYS.
const UNKNOWN_HYPERCALL: u32 = -1000i32 as u32;

pub fn measure(system: &System<'_>) -> Result<(), Error> {
    if !system.wants(&["getpid", "bare_exit", "ept_violation", "page_fault"]) {
        return Ok(());
    }
    let kvm = Kvm::new()?;
    let empty = {
        let mut ticks = Guest::new(&kvm, Pages::There)?.run(0)?;
        ticks.sort_unstable();
        ticks[ticks.len() / 2]
    };
    for (bench, operation, pages) in [
        ("getpid", 1, Pages::There),
        ("bare_exit", 2, Pages::There),
        ("ept_violation", 3, Pages::There),
        // First touch: the host makes the page, the EPT gets it.
        ("page_fault", 3, Pages::New),
    ] {
        let mut ticks = Guest::new(&kvm, pages)?.run(operation)?;
        ticks.iter_mut().for_each(|ticks| *ticks = ticks.saturating_sub(empty));
        system.given(bench, &mut ticks);
    }
    let mut guest = Guest::new(&kvm, Pages::There)?;
    guest.run(0)?;
    let mut round_trips = Vec::with_capacity(COUNT);
    for _ in 0..COUNT {
        let start = ticks();
        guest.run_to_out()?;
        round_trips.push(ticks() - start);
    }
    system.named("kvm to user space").given("getpid", &mut round_trips);
    Ok(())
}

/// What the host has of the pages that the guest touches.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// All; far enough from each other that one fault does not bring the next.
    There,
    /// None; one behind the other, as the other systems' are.
    New,
}

impl Pages {
    fn step(self) -> usize {
        match self {
            Self::There => STEP,
            Self::New => PAGE,
        }
    }
}

struct Guest {
    // Field order is teardown order.
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Memory,
    pages: Pages,
    /// What CPUID's leaf 0 tells the guest.
    highest_leaf: u32,
}

impl Guest {
    fn new(kvm: &Kvm, pages: Pages) -> Result<Self, Error> {
        let memory = Memory::new(BYTES).small();
        let memory = match pages {
            Pages::There => memory.populated(),
            Pages::New => memory,
        };
        // Where the ticks go is there in any case.
        memory.write(RESULTS, 0);
        // SAFETY: Between the two symbols lies the code, which fits.
        unsafe {
            let code = &raw const dune_bench_kvm_guest;
            let bytes = (&raw const dune_bench_kvm_guest_end).offset_from(code) as usize;
            core::ptr::copy_nonoverlapping(code, memory.at(CODE), bytes);
        }
        let vm = kvm.create_vm()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: BYTES as u64,
            userspace_addr: memory.start() as u64,
        };
        // SAFETY: The memory outlives the machine.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let first = cpuid.as_slice().iter().find(|entry| entry.function == 0);
        let highest_leaf = first.ok_or("KVM tells no CPUID leaf 0")?.eax;
        vcpu.set_cpuid2(&cpuid)?;
        let mut sregs = vcpu.get_sregs()?;
        let flat = |kind| kvm_segment {
            limit: 0xffff_ffff,
            selector: 8,
            type_: kind,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0xb);
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.ss,
            &mut sregs.fs,
            &mut sregs.gs,
        ] {
            *segment = flat(3);
        }
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
            pages,
            highest_leaf,
        })
    }

    /// Does `operation` again and again; the ticks of each time.
    fn run(&mut self, operation: u64) -> Result<Vec<u64>, Error> {
        let mut regs = self.vcpu.get_regs()?;
        regs.rip = CODE as u64;
        regs.rflags = 2;
        regs.rsp = CODE as u64;
        regs.rbp = operation;
        regs.rsi = COUNT as u64;
        regs.rdi = RESULTS as u64;
        regs.rbx = PAGES_AT as u64;
        regs.rcx = self.pages.step() as u64;
        self.vcpu.set_regs(&regs)?;
        self.run_to_out()?;
        // SAFETY: The guest wrote them and does not run.
        let results = unsafe { slice::from_raw_parts(self.memory.at(RESULTS).cast::<u32>(), COUNT + 1) };
        let (ticks, answer) = (&results[WARM_UP..COUNT], results[COUNT]);
        let expected = match operation {
            1 => UNKNOWN_HYPERCALL,
            2 => self.highest_leaf,
            _ => 0,
        };
        if answer != expected {
            return Err(format!("operation {operation} gave the guest {answer:#x}, not {expected:#x}").into());
        }
        if operation == 3 && (0..COUNT).any(|page| self.memory.read(PAGES_AT + page * self.pages.step()) != 1) {
            return Err("a guest's write is not there".into());
        }
        Ok(ticks.iter().map(|ticks| u64::from(*ticks)).collect())
    }

    fn run_to_out(&mut self) -> Result<(), Error> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x10, _) => Ok(()),
            other => Err(format!("unexpected exit: {other:?}").into()),
        }
    }
}

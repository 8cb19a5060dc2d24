// SPDX-License-Identifier: MIT OR Apache-2.0

//! A tiny guest of KVM that checks itself: what runs beside Dune in the tests of borrowed VMX.
//!
//! It loops on SYSCALL with LSTAR, STAR, FMASK and TSC_AUX of its own, and looks at them by what SYSCALL and RDTSCP do, at
//! its general-purpose registers, an XMM register and its memory. After so many rounds it writes to port 0x10, after
//! something wrong the number of the check to port 0x11.

use std::arch::global_asm;
use std::slice;

use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::Msrs;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;

use crate::support::Map;

const MEMORY: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;
/// Where the guest keeps words, `WORDS` of them.
const DATA: u64 = 0x1_0000;

const TSC_AUX: u64 = 0x5a5a;
const XMM: u64 = 0x0123_4567_89ab_cdef;

// RDI = rounds before the guest tells, RSI = XMM; RBX counts rounds for ever.
global_asm!(
    ".pushsection .rodata.dune_test_kvm_guest, \"a\", @progbits",
    ".globl dune_test_kvm_guest, dune_test_kvm_syscall, dune_test_kvm_guest_end",
    "dune_test_kvm_guest:",
    "movq xmm7, rsi",
    "2: mov rbp, rdi",
    "3: inc rbx",
    "mov r8d, ebx",
    "and r8d, 0xfff",
    "mov [r8 * 8 + {data}], rbx",
    // Linux' FMASK clears CF as well as DF; this guest's clears DF only.
    "stc",
    "std",
    "syscall",
    "4: mov al, 1",
    "cmp [r8 * 8 + {data}], rbx",
    "jne 9f",
    "mov al, 2",
    "cmp r9, 0x1009",
    "jne 9f",
    "cmp r10, 0x100a",
    "jne 9f",
    "cmp r12, 0x100c",
    "jne 9f",
    "cmp r13, 0x100d",
    "jne 9f",
    "cmp r14, 0x100e",
    "jne 9f",
    "cmp r15, 0x100f",
    "jne 9f",
    "mov al, 3",
    "movq rdx, xmm7",
    "cmp rdx, rsi",
    "jne 9f",
    "rdtscp",
    "mov al, 4",
    "cmp ecx, {tsc_aux}",
    "jne 9f",
    "dec rbp",
    "jnz 3b",
    "out 0x10, al",
    "jmp 2b",
    // SYSCALL comes here, at CPL0 as everything.
    ".balign 16",
    "dune_test_kvm_syscall:",
    "mov al, 5",
    "jnc 9f",
    "pushfq",
    "pop rdx",
    "mov al, 6",
    "test edx, 0x400",
    "jnz 9f",
    "mov al, 7",
    "mov dx, cs",
    "cmp dx, 0x20",
    "jne 9f",
    "lea rdx, [rip + 4b]",
    "mov al, 8",
    "cmp rcx, rdx",
    "jne 9f",
    "jmp rcx",
    "9: out 0x11, al",
    "hlt",
    "dune_test_kvm_guest_end:",
    ".popsection",
    data = const DATA,
    tsc_aux = const TSC_AUX,
);

extern "C" {
    static dune_test_kvm_guest: u8;
    static dune_test_kvm_syscall: u8;
    static dune_test_kvm_guest_end: u8;
}

/// The guest, stopped before its next round.
pub struct KvmGuest {
    // Field order is teardown order.
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: Map,
    rounds: u64,
    checked: u64,
}

impl KvmGuest {
    /// A guest that stops every `rounds` rounds. kvm_intel must be loaded.
    pub fn new(rounds: u64) -> Self {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        let memory = Map::new(MEMORY);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.address() as u64,
        };
        // SAFETY: the memory lives longer than the guest, and only the guest uses it.
        unsafe { vm.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
        memory.write(PML4 as usize, PDPT | 3);
        memory.write(PDPT as usize, PD | 3);
        memory.write(PD as usize, 0x83);
        // SAFETY: the labels enclose the guest's code.
        let (code, syscall) = unsafe {
            let start = &raw const dune_test_kvm_guest;
            let bytes = (&raw const dune_test_kvm_guest_end).offset_from(start) as usize;
            let syscall = (&raw const dune_test_kvm_syscall).offset_from(start);
            (slice::from_raw_parts(start, bytes), CODE + syscall as u64)
        };
        // SAFETY: inside the memory.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.start.add(CODE as usize), code.len()) };

        let vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .expect("KVM_GET_SUPPORTED_CPUID");
        vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");
        let flat = |selector, kind, l| kvm_segment {
            limit: u32::MAX,
            selector,
            type_: kind,
            present: 1,
            s: 1,
            g: 1,
            l,
            db: 1 - l,
            ..kvm_segment::default()
        };
        let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
        sregs.cs = flat(0x20, 11, 1);
        let data = flat(0x28, 3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr3 = PML4;
        // PAE, OSFXSR, OSXMMEXCPT; PE, MP, ET, NE, PG; SCE, LME, LMA.
        sregs.cr4 = 0x620;
        sregs.cr0 = 0x8000_0033;
        sregs.efer = 0x501;
        vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let msrs = [
            msr(0xc000_0081, 0x20 << 32),
            msr(0xc000_0082, syscall),
            msr(0xc000_0084, 0x400),
            msr(0xc000_0103, TSC_AUX),
        ];
        let set = vcpu
            .set_msrs(&Msrs::from_entries(&msrs).unwrap())
            .expect("KVM_SET_MSRS");
        assert_eq!(set, msrs.len(), "MSRs that KVM took");
        let mut regs = vcpu.get_regs().expect("KVM_GET_REGS");
        regs.rip = CODE;
        regs.rsp = 0x7000;
        regs.rflags = 2;
        (regs.rdi, regs.rsi, regs.rbx) = (rounds, XMM, 0);
        (regs.r9, regs.r10, regs.r12) = (0x1009, 0x100a, 0x100c);
        (regs.r13, regs.r14, regs.r15) = (0x100d, 0x100e, 0x100f);
        vcpu.set_regs(&regs).expect("KVM_SET_REGS");
        Self {
            vcpu,
            _vm: vm,
            _memory: memory,
            rounds,
            checked: 0,
        }
    }

    /// Lets it do its rounds; fails the test when it found something wrong.
    pub fn run(&mut self) {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => break,
                Ok(VcpuExit::IoOut(port, data)) => panic!("the guest of KVM: port {port:#x}, check {data:?} failed"),
                Ok(other) => panic!("the guest of KVM: {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("KVM_RUN: {error}"),
            }
        }
        self.checked += self.rounds;
    }

    /// Compares what the guest counted with what it should have; gives the number of rounds.
    pub fn finish(self) -> u64 {
        let regs = self.vcpu.get_regs().expect("KVM_GET_REGS");
        assert_eq!(regs.rbx, self.checked, "rounds that the guest of KVM did");
        self.checked
    }
}

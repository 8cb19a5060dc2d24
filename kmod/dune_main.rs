// SPDX-License-Identifier: GPL-2.0

//! dune.ko: VMX non-root mode for threads of ordinary Linux processes. docs/architecture.md has the map.

mod arch;
mod sys;

#[path = "../abi/src/abi.rs"]
#[allow(dead_code, unreachable_pub)]
mod abi;
mod counters;
mod limits;

mod vmx;

mod ept;

mod space;

mod exit;

mod vcpu;

mod device;

use kernel::prelude::*;

module! {
    type: DuneModule,
    name: "dune",
    description: "Dune: VMX non-root mode for threads of Linux processes",
    license: "GPL",
}

/// What the module holds while it is loaded. Field order is teardown order.
struct DuneModule {
    _device: sys::chardev::CharDevice,
    _spaces: space::Drain,
    _kvm_watch: sys::module::Watcher,
    _vmx: Vmx,
    _l1tf: sys::cpu::L1tf,
    _counters: (sys::debugfs::Dir, sys::debugfs::Dir),
    _percpu: vmx::percpu::Table,
}

/// VMX is on, or left to KVM.
struct Vmx;

impl Vmx {
    fn start() -> Result<Self> {
        vmx::owner::start()?;
        Ok(Self)
    }
}

impl Drop for Vmx {
    fn drop(&mut self) {
        vmx::owner::stop();
    }
}

impl kernel::Module for DuneModule {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        space::check_parameters()?;
        sys::mem::init();
        vmx::vmcs::init();
        vmx::dump::init();
        vmx::vpid::init();
        limits::init();
        space::init();
        let percpu = vmx::percpu::Table::publish()?;
        let counters = counters::show();
        counters.1.add_text::<space::List>(c"list");
        counters.1.add_text::<vmx::dump::LastFailedEntry>(c"last_failed_entry");
        counters.1.add_knobs();
        let l1tf = sys::cpu::L1tf::start().inspect_err(|e| {
            if *e == EPERM {
                pr_err!("this CPU has L1TF and hyper-threading is on: a guest's sibling thread could read any memory. Boot with nosmt, or load with allow_l1tf=1 if you trust the users of Dune\n");
            }
        })?;
        if l1tf.flushes() {
            pr_info!("L1TF: the L1 data cache is flushed before entries\n");
        }
        // Watch before looking whether KVM is there, so that none comes unseen.
        let kvm_watch = sys::module::Watcher::register::<vmx::owner::KvmWatch>()?;
        let vmx = Vmx::start()?;
        let device = sys::chardev::CharDevice::register::<space::Space>()?;
        pr_info!("ready: guest-physical addresses of {} bits\n", space::gpa_bits());
        Ok(Self {
            _device: device,
            _spaces: space::Drain,
            _kvm_watch: kvm_watch,
            _vmx: vmx,
            _l1tf: l1tf,
            _counters: counters,
            _percpu: percpu,
        })
    }
}

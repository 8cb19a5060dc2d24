// SPDX-License-Identifier: MIT OR Apache-2.0
//! `results.json`.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use dune_abi as abi;
use dune_abi::HEAVY_KINDS;
use serde::Deserialize;
use serde::Serialize;

use super::version;
use crate::paths;

/// What a run was made with.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Environment {
    /// Version, name and configuration hash, as the cache names its tree; natively the release.
    pub kernel: String,
    pub kernel_arguments: String,
    pub cpu_model: String,
    /// Of the programs.
    pub rustc: String,
    /// Of kernel and module.
    #[serde(default)]
    pub kernel_rustc: String,
    pub gcc: String,
}

impl Environment {
    pub fn emulated(kernel: &str, cpu_model: &str, append: &str) -> Result<Self> {
        let tree = paths::kernel_tree(kernel)?;
        let name = tree.file_name().context("a kernel's tree has a name")?;
        let config = fs::read_to_string(tree.join(".config")).unwrap_or_default();
        Ok(Self {
            kernel: name.to_string_lossy().into_owned(),
            kernel_arguments: append.to_string(),
            cpu_model: cpu_model.to_string(),
            rustc: version("rustc"),
            kernel_rustc: setting(&config, "CONFIG_RUSTC_VERSION_TEXT"),
            gcc: setting(&config, "CONFIG_CC_VERSION_TEXT"),
        })
    }

    pub fn native() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_string());
        let model = read("/proc/cpuinfo")?
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1).map(str::to_string))
            .unwrap_or_default();
        let kernel = read("/proc/sys/kernel/osrelease")?.trim().to_string();
        let config = fs::read_to_string(format!("/lib/modules/{kernel}/build/.config"))
            .or_else(|_| fs::read_to_string(format!("/boot/config-{kernel}")))
            .unwrap_or_default();
        Ok(Self {
            kernel,
            kernel_arguments: read("/proc/cmdline")?.trim().to_string(),
            cpu_model: model,
            rustc: version("rustc"),
            kernel_rustc: setting(&config, "CONFIG_RUSTC_VERSION_TEXT"),
            gcc: setting(&config, "CONFIG_CC_VERSION_TEXT"),
        })
    }
}

/// The text of a setting in a kernel's configuration.
fn setting(config: &str, name: &str) -> String {
    let text = config
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    text.map_or("unknown".to_string(), |text| text.trim_matches('"').to_string())
}

/// A row as dune-bench tells it.
#[derive(Debug, Deserialize)]
pub struct Line {
    bench: String,
    system: String,
    /// None: ticks.
    #[serde(default)]
    unit: Option<String>,
    value: u64,
    mean: u64,
    #[serde(default)]
    min: u64,
    max: u64,
    n: usize,
    vm_exits: Option<u64>,
    #[serde(default)]
    interrupts: Option<u64>,
    /// By `HEAVY_*`.
    heavy: Option<[u64; HEAVY_KINDS]>,
}

/// Operations that cost hundreds of cycles on a CPU and one instruction in the emulator.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Heavy {
    pub vmread: u64,
    pub vmwrite: u64,
    /// VMPTRLD, VMPTRST, VMCLEAR, VMXON, VMXOFF.
    #[serde(default)]
    pub vmptrld: u64,
    /// INVEPT, INVVPID.
    #[serde(default)]
    pub invalidation: u64,
    pub rdmsr: u64,
    pub wrmsr: u64,
    /// MOV to a control or debug register, LGDT, LLDT, LTR.
    #[serde(default)]
    pub load: u64,
    /// CLI, STI.
    #[serde(default)]
    pub interrupt_flag: u64,
    /// Calls by which Linux interrupts other CPUs.
    #[serde(default)]
    pub ipi: u64,
    /// VMLAUNCH, VMRESUME.
    #[serde(default)]
    pub entry: u64,
}

impl Heavy {
    /// By the module's kinds.
    fn of(counted: &[u64; HEAVY_KINDS]) -> Self {
        Self {
            vmread: counted[abi::HEAVY_VMREAD],
            vmwrite: counted[abi::HEAVY_VMWRITE],
            vmptrld: counted[abi::HEAVY_VMPTRLD],
            invalidation: counted[abi::HEAVY_INVALIDATION],
            rdmsr: counted[abi::HEAVY_RDMSR],
            wrmsr: counted[abi::HEAVY_WRMSR],
            load: counted[abi::HEAVY_LOAD],
            interrupt_flag: counted[abi::HEAVY_INTERRUPT_FLAG],
            ipi: counted[abi::HEAVY_IPI],
            entry: counted[abi::HEAVY_ENTRY],
        }
    }

    /// Its kinds, with their names.
    pub fn kinds(&self) -> [(&'static str, u64); HEAVY_KINDS] {
        [
            ("VMREAD", self.vmread),
            ("VMWRITE", self.vmwrite),
            ("VMPTRLD and its like", self.vmptrld),
            ("INVEPT, INVVPID", self.invalidation),
            ("RDMSR", self.rdmsr),
            ("WRMSR", self.wrmsr),
            ("loads of CR, DR, tables", self.load),
            ("CLI, STI", self.interrupt_flag),
            ("IPIs", self.ipi),
            ("VM entries", self.entry),
        ]
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    pub bench: String,
    pub system: String,
    /// Median.
    pub value: u64,
    pub mean: u64,
    /// 0 where it was not recorded.
    #[serde(default)]
    pub min: u64,
    pub max: u64,
    pub unit: String,
    pub n: usize,
    pub vm_exits: Option<u64>,
    /// How many of them were interrupts, which the operation did not make.
    #[serde(default)]
    pub interrupts: Option<u64>,
    /// The same, of the run in which exits and heavy operations were counted.
    #[serde(default)]
    pub counted_interrupts: Option<u64>,
    pub heavy: Option<Heavy>,
    /// The machine, where it is not the first one.
    pub column: String,
    /// What the figure is to be at most, where it is Dune's.
    pub target: Option<u64>,
    /// What it is to be after that.
    #[serde(default)]
    pub next_target: Option<u64>,
    pub met: Option<bool>,
    /// Why the target was missed, and what to try next.
    #[serde(default)]
    pub reason: Option<String>,
    /// Recorded elsewhere, not measured in this run.
    pub recorded: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Results {
    /// For whoever keeps the file.
    pub license: String,
    pub environment: Environment,
    /// Of the machines that rows name in their column.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_machines: Vec<Environment>,
    pub unit: String,
    pub rows: Vec<Row>,
}

impl Results {
    pub fn new(environment: Environment) -> Self {
        Self {
            license: concat!("SPDX-License", "-Identifier: MIT OR Apache-2.0").to_string(),
            environment,
            other_machines: Vec::new(),
            unit: String::new(),
            rows: Vec::new(),
        }
    }

    pub fn push(&mut self, line: Line, column: &str) {
        self.rows.push(Row {
            bench: line.bench,
            system: line.system,
            value: line.value,
            mean: line.mean,
            min: line.min,
            max: line.max,
            unit: line.unit.unwrap_or_else(|| self.unit.clone()),
            n: line.n,
            vm_exits: line.vm_exits,
            interrupts: line.interrupts,
            counted_interrupts: None,
            heavy: line.heavy.as_ref().map(Heavy::of),
            column: column.to_string(),
            target: None,
            next_target: None,
            met: None,
            reason: None,
            recorded: false,
        });
    }

    /// The row of the first machine.
    pub fn find(&self, bench: &str, system: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.bench == bench && row.system == system && row.column.is_empty())
    }

    /// Takes heavy operations, exits and interrupts of another run of the same, in which they were counted together.
    pub fn take_counted(&mut self, counted: &Self) {
        for row in &mut self.rows {
            let other = counted.find(&row.bench, &row.system);
            if let Some(other) = other.filter(|other| other.heavy.is_some()) {
                (row.vm_exits, row.counted_interrupts, row.heavy) = (other.vm_exits, other.interrupts, other.heavy);
            }
        }
    }
}

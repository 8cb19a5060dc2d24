// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether the module that counts its heavy operations counts all of them: what the disassembly has, beside the marks that
//! counting leaves (`kmod/sys/heavy.h`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use dune_abi::HEAVY_ENTRY;
use dune_abi::HEAVY_INTERRUPT_FLAG;
use dune_abi::HEAVY_INVALIDATION;
use dune_abi::HEAVY_IPI;
use dune_abi::HEAVY_KINDS;
use dune_abi::HEAVY_LOAD;
use dune_abi::HEAVY_RDMSR;
use dune_abi::HEAVY_VMPTRLD;
use dune_abi::HEAVY_VMREAD;
use dune_abi::HEAVY_VMWRITE;
use dune_abi::HEAVY_WRMSR;
use goblin::elf::section_header::SHF_EXECINSTR;
use goblin::elf::sym::STT_FUNC;
use goblin::elf::Elf;
use iced_x86::Code;
use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::Instruction;
use iced_x86::Mnemonic;

/// Names of the kinds, by number.
const KINDS: [&str; HEAVY_KINDS] = [
    "VMREAD",
    "VMWRITE",
    "VMPTRLD …",
    "INVEPT …",
    "RDMSR",
    "WRMSR",
    "loads of CR, DR, tables",
    "CLI, STI",
    "IPI",
    "VMLAUNCH, VMRESUME",
];
/// Functions of Linux that have one of a kind in them, as their names begin.
const CALLED: [(&str, usize); 4] = [
    ("smp_call_function", HEAVY_IPI),
    ("on_each_cpu", HEAVY_IPI),
    ("__flush_tlb", HEAVY_IPI),
    ("cr4_update_irqsoff", HEAVY_LOAD),
];
/// Replacements of instructions, of which each is another way to do what the marked place does.
const ALTERNATIVES: &str = ".altinstr_replacement";
/// Where the knobs of tests, which no benchmark has, read the host's state.
const UNCOUNTED: [&str; 1] = ["dune_host_state_get"];

/// Places of one function, by kind: in the code, and marked.
type Places = BTreeMap<String, [(usize, usize); KINDS.len()]>;

/// Looks at a `dune.ko` built with `DUNE_COUNT_OPS=y`. Returns how many places it has, and what is wrong with them.
///
/// # Errors
///
/// Where the file is none.
pub fn look(module: &Path) -> Result<(usize, Vec<String>)> {
    let bytes = fs::read(module).with_context(|| module.display().to_string())?;
    let elf = Elf::parse(&bytes).with_context(|| module.display().to_string())?;
    let functions = Functions::of(&elf);
    let mut places = Places::new();
    for (index, section) in elf.section_headers.iter().enumerate() {
        let name = elf.shdr_strtab.get_at(section.sh_name).unwrap_or_default();
        if section.sh_flags & u64::from(SHF_EXECINSTR) == 0 || name == ALTERNATIVES {
            continue;
        }
        let code = section
            .file_range()
            .and_then(|range| bytes.get(range))
            .unwrap_or_default();
        for instruction in Decoder::new(64, code, DecoderOptions::NONE).iter() {
            if let Some(kind) = kind_of(&instruction) {
                let function = functions.at(index, instruction.ip());
                places.entry(function).or_default()[kind].0 += 1;
            }
        }
    }
    for (section, relocations) in &elf.shdr_relocs {
        let of = elf.section_headers[*section].sh_info as usize;
        let is_marks = elf.shdr_strtab.get_at(elf.section_headers[of].sh_name) == Some(".dune_heavy");
        let is_code = elf.section_headers[of].sh_flags & u64::from(SHF_EXECINSTR) != 0;
        for relocation in relocations.iter() {
            let symbol = elf
                .syms
                .get(relocation.r_sym)
                .context("a relocation without a symbol")?;
            if is_marks {
                let at = symbol.st_value.wrapping_add_signed(relocation.r_addend.unwrap_or(0));
                let kind = elf.section_headers[of].sh_offset as usize + relocation.r_offset as usize + 8;
                let kind = usize::from(*bytes.get(kind).context("a mark without a kind")?);
                let function = functions.at(symbol.st_shndx, at);
                places.entry(function).or_default()[kind].1 += 1;
            } else if is_code {
                let called = elf.strtab.get_at(symbol.st_name).unwrap_or_default();
                if let Some((_, kind)) = CALLED.iter().find(|(name, _)| called.starts_with(name)) {
                    let function = functions.at(of, relocation.r_offset);
                    places.entry(function).or_default()[*kind].0 += 1;
                }
            }
        }
    }
    Ok(judge(&places))
}

fn judge(places: &Places) -> (usize, Vec<String>) {
    let (mut all, mut wrong) = (0, Vec::new());
    for (function, kinds) in places {
        if UNCOUNTED.contains(&function.as_str()) {
            continue;
        }
        for (kind, (found, marked)) in kinds.iter().enumerate() {
            all += found;
            // VMLAUNCH and VMRESUME are two places that one entry has a choice of.
            let expected = if kind == HEAVY_ENTRY { found / 2 } else { *found };
            if expected != *marked {
                wrong.push(format!("{function}: {found} of {}, {marked} counted", KINDS[kind]));
            }
        }
    }
    if all == 0 {
        wrong.push("no heavy operation at all: is it the module?".to_string());
    }
    (all, wrong)
}

/// The kind of an instruction; `None`: it is not heavy.
fn kind_of(instruction: &Instruction) -> Option<usize> {
    Some(match instruction.mnemonic() {
        Mnemonic::Vmread => HEAVY_VMREAD,
        Mnemonic::Vmwrite => HEAVY_VMWRITE,
        Mnemonic::Vmptrld | Mnemonic::Vmptrst | Mnemonic::Vmclear | Mnemonic::Vmxon | Mnemonic::Vmxoff => HEAVY_VMPTRLD,
        Mnemonic::Invept | Mnemonic::Invvpid | Mnemonic::Invpcid | Mnemonic::Invlpg | Mnemonic::Wbinvd => {
            HEAVY_INVALIDATION
        }
        Mnemonic::Rdmsr => HEAVY_RDMSR,
        Mnemonic::Wrmsr | Mnemonic::Wrmsrns | Mnemonic::Xsetbv => HEAVY_WRMSR,
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Lldt | Mnemonic::Ltr | Mnemonic::Lmsw | Mnemonic::Swapgs => {
            HEAVY_LOAD
        }
        Mnemonic::Mov => match instruction.code() {
            Code::Mov_cr_r64 | Code::Mov_dr_r64 => HEAVY_LOAD,
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => HEAVY_LOAD,
            _ => return None,
        },
        Mnemonic::Cli | Mnemonic::Sti | Mnemonic::Popfq => HEAVY_INTERRUPT_FLAG,
        Mnemonic::Vmlaunch | Mnemonic::Vmresume => HEAVY_ENTRY,
        _ => return None,
    })
}

/// Functions by section, in order of their addresses.
struct Functions(BTreeMap<(usize, u64), String>);

impl Functions {
    fn of(elf: &Elf<'_>) -> Self {
        let functions = elf.syms.iter().filter(|symbol| symbol.st_type() == STT_FUNC);
        Self(
            functions
                .map(|symbol| {
                    let name = elf.strtab.get_at(symbol.st_name).unwrap_or_default();
                    ((symbol.st_shndx, symbol.st_value), name.to_string())
                })
                .collect(),
        )
    }

    /// The function that has that place, by its symbol.
    fn at(&self, section: usize, offset: u64) -> String {
        let before = self.0.range((section, 0)..=(section, offset)).next_back();
        before.map_or_else(|| format!("section {section}"), |(_, name)| name.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(code: &[u8]) -> Option<usize> {
        kind_of(&Decoder::new(64, code, DecoderOptions::NONE).decode())
    }

    #[test]
    fn heavy_instructions_are_known() {
        assert_eq!(kind(&[0x0f, 0x78, 0xc1]), Some(HEAVY_VMREAD), "VMREAD");
        assert_eq!(kind(&[0x0f, 0x30]), Some(HEAVY_WRMSR), "WRMSR");
        assert_eq!(kind(&[0x0f, 0x22, 0xd8]), Some(HEAVY_LOAD), "MOV to CR3");
        assert_eq!(kind(&[0x0f, 0x20, 0xd8]), None, "MOV from CR3");
        assert_eq!(kind(&[0x8e, 0xd8]), Some(HEAVY_LOAD), "MOV to DS");
        assert_eq!(kind(&[0xfa]), Some(HEAVY_INTERRUPT_FLAG), "CLI");
        assert_eq!(kind(&[0x0f, 0x01, 0xc3]), Some(HEAVY_ENTRY), "VMRESUME");
    }

    #[test]
    fn a_place_without_a_mark_is_told() {
        let mut places = Places::new();
        places.entry("f".to_string()).or_default()[HEAVY_RDMSR] = (2, 2);
        assert_eq!(judge(&places), (2, vec![]));
        places.entry("g".to_string()).or_default()[HEAVY_RDMSR] = (2, 1);
        assert_eq!(judge(&places).1, ["g: 2 of RDMSR, 1 counted"]);
        assert_eq!(judge(&Places::new()).1.len(), 1);
    }
}

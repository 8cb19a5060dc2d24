// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finds the loader and the libraries that a dynamic program needs.

use std::collections::BTreeSet;
use std::path::Path;
use std::path::PathBuf;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;
use goblin::elf::Elf;

/// Where a library is looked for, in order, behind the program's own run path.
const LIBRARY_DIRS: &[&str] = &[
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

/// Returns every file that `program` needs at run time: its loader, its
/// libraries and theirs. Empty for a static program or a script.
///
/// # Errors
///
/// When a needed library is in none of the usual directories.
pub fn needed_files(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut queue = vec![program.to_path_buf()];
    while let Some(file) = queue.pop() {
        let bytes = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        if !bytes.starts_with(b"\x7fELF") {
            continue;
        }
        let elf = Elf::parse(&bytes).with_context(|| format!("parsing {}", file.display()))?;
        if let Some(interpreter) = elf.interpreter {
            found.insert(PathBuf::from(interpreter));
        }
        let origin = file.parent().unwrap_or(Path::new("/"));
        let run_paths: Vec<PathBuf> = elf
            .runpaths
            .iter()
            .chain(elf.rpaths.iter())
            .flat_map(|list| list.split(':'))
            .map(|dir| PathBuf::from(dir.replace("$ORIGIN", &origin.to_string_lossy())))
            .collect();
        for library in &elf.libraries {
            let path = find_library(library, &run_paths)
                .with_context(|| format!("{} needs {library}, which is nowhere", file.display()))?;
            if found.insert(path.clone()) {
                queue.push(path);
            }
        }
    }
    Ok(found)
}

fn find_library(name: &str, run_paths: &[PathBuf]) -> Result<PathBuf> {
    let usual = LIBRARY_DIRS.iter().map(PathBuf::from);
    for dir in run_paths.iter().cloned().chain(usual) {
        let candidate = dir.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("not in {}", LIBRARY_DIRS.join(", "))
}

#[cfg(test)]
mod tests {
    use super::needed_files;

    #[test]
    fn own_test_binary_needs_a_loader_and_libc() {
        let program = std::env::current_exe().unwrap();
        let files = needed_files(&program).unwrap();
        let names: Vec<String> = files
            .iter()
            .map(|f| f.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert!(names.iter().any(|n| n.starts_with("ld-linux")), "{names:?}");
        assert!(names.iter().any(|n| n.starts_with("libc.so")), "{names:?}");
    }

    #[test]
    fn a_script_needs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        assert!(needed_files(&script).unwrap().is_empty());
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the tree, the built programs and the kernels are.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

/// The programs that go into `/usr/bin` of every image, when they are built.
pub const PROGRAMS: &[&str] = &[
    "hello",
    "getpid",
    "pagefault",
    "plugin",
    "gc",
    "sthread",
    "guide_page_table",
    "guide_ring3",
    "guide_hooks",
    "wordcount",
    "dune-tests",
    "dune-bench",
    "dune-nothing",
    "dune-small",
];

/// The program that the module starts where KVM is; goes into `/usr/libexec`.
pub const KVM_HELPER: &str = "dune-kvm";

/// The library that puts unmodified programs into Dune mode; goes into `/usr/lib`.
pub const PRELOAD: &str = "libdune_preload.so";

/// The library for programs in C; goes into `/usr/lib`.
pub const LIBRARY: &str = "libdune.so";

/// Programs in C that use it, which `scripts/c-compat` compiles; go into `/usr/libexec/dune/c-compat`.
pub fn c_programs() -> PathBuf {
    target_dir().join("c-compat/bin")
}

/// The root of the source tree: where this was built, or `DUNE_ROOT`.
pub fn root() -> PathBuf {
    if let Some(root) = std::env::var_os("DUNE_ROOT") {
        return PathBuf::from(root);
    }
    let vm = Path::new(env!("CARGO_MANIFEST_DIR"));
    vm.parent().unwrap_or(vm).to_path_buf()
}

/// cargo's target directory.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| root().join("target"))
}

/// The built programs of [`PROGRAMS`] that exist.
pub fn programs() -> Vec<PathBuf> {
    PROGRAMS
        .iter()
        .map(|name| target_dir().join("release").join(name))
        .filter(|path| path.is_file())
        .collect()
}

/// The built tree of the kernel `name`, built first when it is not there.
pub fn kernel_tree(name: &str) -> Result<PathBuf> {
    if let Some(tree) = std::env::var_os("DUNE_KERNEL_TREE") {
        return Ok(PathBuf::from(tree));
    }
    script_answer("kernel", &[name])
}

/// `dune.ko` for the kernel `name`, built first when it is not up to date;
/// `variant` is a variable for its build, `DUNE_MUTATE=retry`.
pub fn module(name: &str, variant: Option<&str>) -> Result<PathBuf> {
    let mut arguments = vec![name];
    arguments.extend(variant);
    script_answer("module", &arguments)
}

/// The benchmark's small program, built first when it is not up to date.
pub fn small_program() -> Result<PathBuf> {
    script_answer("small", &[])
}

/// Whether the tree has a module to build.
pub fn has_module() -> bool {
    root().join("Kbuild").is_file()
}

/// Runs `scripts/SCRIPT ARGUMENTS` and returns the path it prints last.
fn script_answer(script: &str, arguments: &[&str]) -> Result<PathBuf> {
    let name = arguments.join(" ");
    let path = root().join("scripts").join(script);
    let output = Command::new(&path)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", path.display()))?;
    if !output.status.success() {
        bail!("scripts/{script} {name} failed ({})", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last() {
        Some(line) if Path::new(line).exists() => Ok(PathBuf::from(line)),
        other => bail!("scripts/{script} {name} answered {other:?}"),
    }
}

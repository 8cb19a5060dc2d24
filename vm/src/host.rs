// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs on this very machine instead of an emulated one.

use std::fs;
use std::process::Command;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

use crate::paths;

/// Why this machine cannot run Dune itself; `None` when it can.
pub fn why_not_native() -> Option<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_vmx = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|flag| flag == "vmx"));
    if !has_vmx {
        return Some("its CPU offers no VT-x".to_string());
    }
    // SAFETY: geteuid cannot fail and touches nothing.
    if unsafe { libc::geteuid() } != 0 {
        return Some("inserting the module needs root".to_string());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let build = format!("/lib/modules/{}/build/.config", release.trim());
    match fs::read_to_string(&build) {
        Ok(config) if config.lines().any(|line| line == "CONFIG_RUST=y") => None,
        Ok(_) => Some("its kernel is built without Rust".to_string()),
        Err(_) => Some(format!("{build} is missing")),
    }
}

/// Like [`run`] as root with a freshly loaded module; returns what the command
/// wrote, and its exit status.
pub fn capture(command: &str) -> Result<(i32, String)> {
    let file = tempfile::NamedTempFile::new()?;
    let code = format!("{{ {command}; }} >{} 2>&1", file.path().display());
    let status = run(&code, "root", Some(&[]))?;
    let output = fs::read_to_string(file.path())?;
    Ok((status, output))
}

/// Loads the module, runs `command` as `user` and unloads the module. Returns
/// the command's exit status.
pub fn run(command: &str, user: &str, module_parameters: Option<&[String]>) -> Result<i32> {
    let script = |name: &str| Command::new(paths::root().join("scripts").join(name));
    if let Some(parameters) = module_parameters {
        let module = paths::module("native", None)?;
        let status = script("load")
            .env("DUNE_MODULE", module)
            .args(parameters)
            .status()
            .context("running scripts/load")?;
        if !status.success() {
            bail!("scripts/load failed ({status})");
        }
    }
    let path = format!(
        "{}:{}",
        paths::target_dir().join("release").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut child = if user == "root" {
        let mut child = Command::new("sh");
        child.args(["-c", command]);
        child
    } else {
        let mut child = Command::new("su");
        child.args(["-s", "/bin/sh", user, "-c", command]);
        child
    };
    let status = child.env("PATH", path).status().context("running sh")?;
    if module_parameters.is_some() && !script("unload").status()?.success() {
        bail!("the module could not be removed");
    }
    Ok(status.code().unwrap_or(128))
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs on this very machine instead of an emulated one: the files of the image are the root directory of a mount
//! namespace, so that everything is in the same place, and nothing of this machine's own is written.

use std::fs;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use nix::mount::mount;
use nix::mount::MsFlags;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use nix::unistd::chdir;
use nix::unistd::chroot;
use nix::unistd::geteuid;

use crate::image::Initramfs;
use crate::machine;
use crate::paths;

/// Names another module than the one that is built for the running kernel, as for `scripts/load`.
const MODULE: &str = "DUNE_MODULE";

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
    if !geteuid().is_root() {
        return Some("inserting the module needs root".to_string());
    }
    if std::env::var_os(MODULE).is_some() {
        return None;
    }
    let config = build_tree().join(".config");
    match fs::read_to_string(&config) {
        Ok(config) if config.lines().any(|line| line == "CONFIG_RUST=y") => None,
        Ok(_) => Some("its kernel is built without Rust".to_string()),
        Err(_) => Some(format!("{} is missing", config.display())),
    }
}

/// Where the running kernel's modules are built.
fn build_tree() -> PathBuf {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Path::new("/lib/modules").join(release.trim()).join("build")
}

/// What of the module goes along.
pub enum Module {
    None,
    Plain,
    /// With the knobs that tests turn.
    ForTests,
}

/// The image's files for this machine, with what is built.
///
/// # Errors
///
/// What does not build.
pub fn files(module: &Module) -> Result<Initramfs> {
    let module = match (module, std::env::var_os(MODULE)) {
        (Module::None, _) => None,
        (_, Some(path)) => Some(PathBuf::from(path)),
        (Module::Plain, None) => Some(paths::module("native", None)?),
        (Module::ForTests, None) => Some(paths::module("native", Some("DUNE_DEBUG_KNOBS=y"))?),
    };
    let mut files = Initramfs::base(&build_tree())?;
    files.be_native();
    files.add_built(module.as_deref())?;
    Ok(files)
}

/// What came of a command, and what is to be judged with it.
pub struct Captured {
    pub status: i32,
    pub output: String,
    /// What the command was given as `dune_token`.
    pub token: String,
    /// What the kernel logged meanwhile, whoever caused it.
    pub kernel_log: String,
}

/// Like [`run`] as root with a freshly loaded module.
///
/// # Errors
///
/// As [`run`]; where the kernel's log cannot be read.
pub fn capture(command: &str, module: &Module) -> Result<Captured> {
    let mut shell = prepare(files(module)?, command, "root", &["own"])?;
    let token = machine::random_token()?;
    let mut log = KernelLog::from_now().context("/dev/kmsg")?;
    let output = shell
        .command
        .env("dune_token", &token)
        .output()
        .context("running busybox")?;
    Ok(Captured {
        status: output.status.code().unwrap_or(128),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        token,
        kernel_log: log.read().context("/dev/kmsg")?,
    })
}

/// In a log that is not whole.
pub const OVERWRITTEN: &str = "(here the kernel has overwritten its log: a larger log_buf_len= keeps it)";

/// What the kernel logs from some moment on (`Documentation/ABI/testing/dev-kmsg`).
struct KernelLog(fs::File);

impl KernelLog {
    fn from_now() -> io::Result<Self> {
        let mut file = fs::File::options()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        file.seek(io::SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// What came since, without the records' heads; a line of [`OVERWRITTEN`] where the kernel has lost some of it.
    fn read(&mut self) -> io::Result<String> {
        let mut log = String::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(log),
                Ok(bytes) => {
                    let record = String::from_utf8_lossy(&record[..bytes]);
                    log.push_str(record.split_once(';').map_or(&record, |(_, text)| text));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(log),
                // The next read goes on behind the gap.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => log.push_str(&format!("{OVERWRITTEN}\n")),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Loads the module with the given parameters, if any, runs `command` as `user` among `files`, and unloads it. Without
/// parameters a module serves that is loaded already. Returns the command's exit status.
///
/// # Errors
///
/// Where the files cannot be written or the command not be started.
pub fn run(files: Initramfs, command: &str, user: &str, module_parameters: Option<&[String]>) -> Result<i32> {
    let mut module = vec![match module_parameters {
        None => "no",
        Some([]) => "any",
        Some(_) => "own",
    }];
    module.extend(module_parameters.unwrap_or_default().iter().map(String::as_str));
    let mut shell = prepare(files, command, user, &module)?;
    let status = shell.command.status().context("running busybox")?;
    Ok(status.code().unwrap_or(128))
}

/// A command and the directory in which it runs, which goes with it.
struct Prepared {
    command: Command,
    _root: tempfile::TempDir,
}

/// `module`: what `vm/guest/native` is to do with it.
fn prepare(mut files: Initramfs, command: &str, user: &str, module: &[&str]) -> Result<Prepared> {
    files.add_text("dune/command", &format!("#!/bin/sh\n{{ {command}\n}} 2>&1\n"), 0o755);
    files.add_file("dune/native", &paths::root().join("vm/guest/native"))?;
    let root = tempfile::Builder::new().prefix("dune-vm.native.").tempdir()?;
    // Others go through it.
    fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    files.unpack(root.path())?;
    let mut shell = Command::new("/bin/busybox");
    shell.args(["sh", "/dune/native", user]).args(module);
    let directory = root.path().to_path_buf();
    // SAFETY: System calls only, in the child.
    unsafe { shell.pre_exec(move || enter_root(&directory).map_err(io::Error::from)) };
    Ok(Prepared {
        command: shell,
        _root: root,
    })
}

/// Makes `root` the root directory of a mount namespace of this process' own. Not by chroot alone, in which Linux lets
/// nobody make a user namespace.
fn enter_root(root: &Path) -> nix::Result<()> {
    const NO: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NO, "/", NO, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NO)?;
    mount(Some(root), root, NO, MsFlags::MS_BIND, NO)?;
    chdir(root)?;
    for directory in ["proc", "sys", "dev"] {
        let own = Path::new("/").join(directory);
        mount(Some(&own), directory, NO, MsFlags::MS_BIND | MsFlags::MS_REC, NO)?;
    }
    for (directory, mode) in [("tmp", "mode=1777"), ("run", "mode=755")] {
        mount(Some("dune"), directory, Some("tmpfs"), MsFlags::empty(), Some(mode))?;
    }
    mount(Some("."), "/", NO, MsFlags::MS_MOVE, NO)?;
    chroot(".")?;
    chdir("/")
}

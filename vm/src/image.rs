// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packs what a machine boots: an uncompressed initramfs inside a bootable ISO.
//!
//! The guest's file system is busybox, the programs under test with the host's
//! loader and libraries, the kernel modules, and `vm/guest/init`.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io::BufWriter;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;
use cpio::newc::Builder;
use cpio::newc::ModeFileType;

use crate::elf;
use crate::paths;

/// Numbers of the guest's users and of its group `dune`, in which `tester` is and `outsider` is not.
#[derive(Clone, Copy, Debug)]
struct Ids {
    dune: u32,
    tester: u32,
    outsider: u32,
}

impl Ids {
    /// As `vm/guest/init` has them.
    const GUEST: Self = Self {
        dune: 990,
        tester: 1000,
        outsider: 1001,
    };

    /// Where the machine is a real one, with users of its own: numbers that nobody has. `groups`: its /etc/group.
    fn native(groups: &str) -> Self {
        let dune = groups.lines().find_map(|line| line.strip_prefix("dune:"));
        let dune = dune.and_then(|rest| rest.split(':').nth(1)?.parse().ok());
        Self {
            dune: dune.unwrap_or(Self::GUEST.dune),
            tester: 64990,
            outsider: 64991,
        }
    }

    /// `/etc/passwd`.
    fn passwd(self) -> String {
        let Self { tester, outsider, .. } = self;
        format!(
            "root:x:0:0:root:/root:/bin/sh\n\
             tester:x:{tester}:{tester}:tester:/home/tester:/bin/sh\n\
             outsider:x:{outsider}:{outsider}:outsider:/home/outsider:/bin/sh\n"
        )
    }

    /// `/etc/group`.
    fn group(self) -> String {
        let Self { dune, tester, outsider } = self;
        format!("root:x:0:\ntty:x:5:\ndune:x:{dune}:tester\ntester:x:{tester}:\noutsider:x:{outsider}:\n")
    }
}

/// Where the tree is for a harness in the machine: not in a directory over which `init` mounts.
const HARNESS_ROOT: &str = "/opt/dune";

const BUSYBOX: &str = "/bin/busybox";
const ISOLINUX: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const LDLINUX: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";

/// The kernel modules that KVM consists of, in load order, relative to the
/// kernel's build tree. `init` loads them only when asked.
const KVM_MODULES: &[&str] = &[
    "virt/lib/irqbypass.ko",
    "arch/x86/kvm/kvm.ko",
    "arch/x86/kvm/kvm-intel.ko",
];

enum Node {
    Dir,
    File { source: Source, mode: u32 },
    Symlink(String),
    CharDevice { major: u32, minor: u32 },
}

enum Source {
    Host(PathBuf),
    Bytes(Vec<u8>),
}

/// A guest file system in the making; directories come by themselves.
#[derive(Default)]
pub struct Initramfs {
    nodes: BTreeMap<String, Node>,
}

impl Initramfs {
    /// The file system that every machine has: busybox, users, init, the load
    /// and unload scripts and the modules of the kernel built in `kernel_tree`.
    pub fn base(kernel_tree: &Path) -> Result<Self> {
        let mut fs = Self::default();
        if !Path::new(BUSYBOX).is_file() {
            bail!("{BUSYBOX} is missing: run scripts/setup");
        }
        fs.add_file(BUSYBOX, Path::new(BUSYBOX))?;
        fs.insert("bin/sh", Node::Symlink("busybox".into()));
        fs.insert("dev/console", Node::CharDevice { major: 5, minor: 1 });
        for dir in [
            "proc",
            "sys",
            "run",
            "tmp",
            "mnt",
            "root",
            "home/tester",
            "home/outsider",
            "sbin",
            "usr/sbin",
        ] {
            fs.insert(dir, Node::Dir);
        }
        fs.add_users(Ids::GUEST);
        let root = paths::root();
        fs.add_file("init", &root.join("vm/guest/init"))?;
        for script in ["load", "unload"] {
            let path = root.join("scripts").join(script);
            if path.is_file() {
                fs.add_file(&format!("usr/sbin/dune-{script}"), &path)?;
            }
        }
        for module in KVM_MODULES {
            let path = kernel_tree.join(module);
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                fs.add_file(&format!("lib/modules/{name}"), &path)?;
            }
        }
        Ok(fs)
    }

    /// For a real machine: users with numbers that nobody has, the machine's own group `dune`, no first program.
    pub fn be_native(&mut self) {
        self.add_users(Ids::native(&fs::read_to_string("/etc/group").unwrap_or_default()));
        self.nodes.remove("init");
    }

    fn add_users(&mut self, ids: Ids) {
        self.add_text("etc/passwd", &ids.passwd(), 0o644);
        self.add_text("etc/group", &ids.group(), 0o644);
    }

    /// Writes everything but devices into a directory.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn unpack(&self, target: &Path) -> Result<()> {
        for (path, node) in &self.nodes {
            let to = target.join(path);
            let written = match node {
                Node::Dir => fs::create_dir(&to),
                Node::File { source, mode } => match source {
                    Source::Host(host) => fs::copy(host, &to).map(drop),
                    Source::Bytes(bytes) => fs::write(&to, bytes),
                }
                .and_then(|()| fs::set_permissions(&to, fs::Permissions::from_mode(*mode))),
                Node::Symlink(link) => std::os::unix::fs::symlink(link, &to),
                Node::CharDevice { .. } => Ok(()),
            };
            written.with_context(|| format!("writing {}", to.display()))?;
        }
        Ok(())
    }

    /// Adds the module, if any, and the programs of this project that are built.
    pub fn add_built(&mut self, module: Option<&Path>) -> Result<()> {
        if let Some(path) = module {
            self.add_file("lib/modules/dune.ko", path)?;
        }
        for program in paths::programs() {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            self.add_program(&format!("usr/bin/{name}"), &program)?;
        }
        for name in [paths::PRELOAD, paths::LIBRARY] {
            let library = paths::target_dir().join("release").join(name);
            if library.is_file() {
                self.add_program(&format!("usr/lib/{name}"), &library)?;
            }
        }
        let c_programs = paths::c_programs();
        if c_programs.is_dir() {
            self.add_file("usr/libexec/dune/c-compat", &c_programs)?;
        }
        let helper = paths::target_dir().join("release").join(paths::KVM_HELPER);
        if helper.is_file() {
            self.add_program(&format!("usr/libexec/{}", paths::KVM_HELPER), &helper)?;
        }
        Ok(())
    }

    /// Adds `dune-vm` and what it takes from the tree, which is [`HARNESS_ROOT`] there. Returns the environment for it.
    pub fn add_harness(&mut self) -> Result<String> {
        for directory in ["scripts", "vm/guest"] {
            self.add_file(&format!("{HARNESS_ROOT}/{directory}"), &paths::root().join(directory))?;
        }
        let built = paths::target_dir().join("release");
        let (vm, helper) = (built.join("dune-vm"), built.join(paths::KVM_HELPER));
        self.add_program("usr/bin/dune-vm", &vm)?;
        for program in paths::programs().into_iter().chain([helper]) {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            self.add_program(&format!("{HARNESS_ROOT}/target/release/{name}"), &program)?;
        }
        Ok(format!(
            "export DUNE_ROOT={HARNESS_ROOT} CARGO_TARGET_DIR={HARNESS_ROOT}/target DUNE_MODULE=/lib/modules/dune.ko"
        ))
    }

    /// Adds what `HOST` or `HOST:GUEST` names: a program with its libraries, or a directory. Without `GUEST` a program goes
    /// to /usr/bin.
    pub fn take_along(&mut self, entry: &str) -> Result<()> {
        let (host, guest) = match entry.split_once(':') {
            Some((host, guest)) => (PathBuf::from(host), guest.to_string()),
            None => {
                let host = PathBuf::from(entry);
                let Some(name) = host.file_name() else {
                    bail!("{entry}: no file name");
                };
                let guest = format!("usr/bin/{}", name.to_string_lossy());
                (host, guest)
            }
        };
        if host.is_dir() {
            self.add_file(&guest, &host)
        } else {
            self.add_program(&guest, &host)
        }
    }

    /// Adds a program under `guest_path` with everything it needs to run.
    pub fn add_program(&mut self, guest_path: &str, program: &Path) -> Result<()> {
        self.add_file(guest_path, program)?;
        for file in elf::needed_files(program)? {
            self.add_file(&file.to_string_lossy(), &file)?;
        }
        Ok(())
    }

    /// Adds a host file, with its permission bits, or a host directory with all
    /// that is in it.
    pub fn add_file(&mut self, guest_path: &str, host: &Path) -> Result<()> {
        let metadata = fs::metadata(host).with_context(|| format!("looking at {}", host.display()))?;
        if metadata.is_dir() {
            self.insert(guest_path, Node::Dir);
            for entry in fs::read_dir(host)? {
                let entry = entry?;
                let inner = format!("{guest_path}/{}", entry.file_name().to_string_lossy());
                self.add_file(&inner, &entry.path())?;
            }
            return Ok(());
        }
        let mode = metadata.permissions().mode() & 0o777;
        let source = Source::Host(host.to_path_buf());
        self.insert(guest_path, Node::File { source, mode });
        Ok(())
    }

    /// Adds a file with the given text.
    pub fn add_text(&mut self, guest_path: &str, text: &str, mode: u32) {
        let source = Source::Bytes(text.as_bytes().to_vec());
        self.insert(guest_path, Node::File { source, mode });
    }

    fn insert(&mut self, guest_path: &str, node: Node) {
        let path = guest_path.trim_matches('/').to_string();
        for (slash, _) in path.match_indices('/') {
            self.nodes.entry(path[..slash].to_string()).or_insert(Node::Dir);
        }
        self.nodes.insert(path, node);
    }

    /// Writes the archive. Parents come before what is in them, because a
    /// directory's name sorts before every longer path.
    pub fn write(&self, target: &Path) -> Result<()> {
        let mut out: Box<dyn Write> = Box::new(BufWriter::with_capacity(
            1 << 20,
            File::create(target).with_context(|| format!("creating {}", target.display()))?,
        ));
        for (inode, (path, node)) in self.nodes.iter().enumerate() {
            let header = Builder::new(path).ino(inode as u32 + 1);
            let (header, body) = match node {
                Node::Dir => {
                    let mode = if path == "tmp" { 0o1777 } else { 0o755 };
                    let header = header.set_mode_file_type(ModeFileType::Directory);
                    (header.mode(0o040_000 | mode), Vec::new())
                }
                Node::File { source, mode } => {
                    let body = match source {
                        Source::Host(host) => fs::read(host).with_context(|| format!("reading {}", host.display()))?,
                        Source::Bytes(bytes) => bytes.clone(),
                    };
                    (header.mode(0o100_000 | mode), body)
                }
                Node::Symlink(to) => (header.mode(0o120_777), to.clone().into_bytes()),
                Node::CharDevice { major, minor } => {
                    (header.mode(0o020_600).rdev_major(*major).rdev_minor(*minor), Vec::new())
                }
            };
            let mut writer = header.write(out, body.len() as u32);
            writer.write_all(&body)?;
            out = writer.finish()?;
        }
        let mut out = cpio::newc::trailer(out)?;
        out.flush()?;
        Ok(())
    }
}

/// Makes a bootable ISO from a kernel image, an initramfs and a command line.
pub fn write_iso(dir: &Path, bzimage: &Path, initramfs: &Path, arguments: &str) -> Result<PathBuf> {
    let tree = dir.join("iso");
    fs::create_dir_all(&tree)?;
    for (from, to) in [
        (Path::new(ISOLINUX), "isolinux.bin"),
        (Path::new(LDLINUX), "ldlinux.c32"),
    ] {
        fs::copy(from, tree.join(to)).with_context(|| format!("copying {}: run scripts/setup", from.display()))?;
    }
    fs::copy(bzimage, tree.join("kernel")).with_context(|| format!("copying {}", bzimage.display()))?;
    fs::rename(initramfs, tree.join("initrd"))?;
    fs::write(
        tree.join("isolinux.cfg"),
        format!("default dune\nprompt 0\nlabel dune\n kernel /kernel\n append initrd=/initrd {arguments}\n"),
    )?;
    let iso = dir.join("boot.iso");
    let output = Command::new("xorriso")
        .args(["-as", "mkisofs", "-quiet", "-o"])
        .arg(&iso)
        .args(["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot"])
        .args(["-boot-load-size", "4", "-boot-info-table"])
        .arg(&tree)
        .output()
        .context("running xorriso: run scripts/setup")?;
    if !output.status.success() {
        bail!("xorriso: {}", String::from_utf8_lossy(&output.stderr));
    }
    fs::remove_dir_all(&tree)?;
    Ok(iso)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_a_real_machine_keep_apart_from_its_own() {
        let ids = Ids::native("root:x:0:\ndune:x:64:somebody\nduned:x:7:\n");
        assert_eq!((ids.dune, ids.tester, ids.outsider), (64, 64990, 64991));
        assert!(ids
            .group()
            .contains("\ndune:x:64:tester\ntester:x:64990:\noutsider:x:64991:\n"));
        assert!(ids
            .passwd()
            .contains("\ntester:x:64990:64990:tester:/home/tester:/bin/sh\n"));
        assert_eq!(Ids::native("root:x:0:\n").dune, Ids::GUEST.dune);
    }
}

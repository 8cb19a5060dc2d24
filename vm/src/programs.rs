// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of the distribution that the tests run unmodified in Dune mode. `scripts/setup` installs them.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::Context;
use anyhow::Result;

/// Each with its libraries, under the same path in the guest.
const PROGRAMS: &[&str] = &[
    "/bin/bash",
    "/usr/bin/sqlite3",
    "/usr/bin/stress-ng",
    "/usr/bin/redis-server",
    "/usr/bin/redis-cli",
    "/usr/bin/redis-benchmark",
    "/usr/bin/gcc",
    "/usr/bin/as",
    "/usr/bin/gdb",
];

/// What goes along, in the form of [`crate::image::Initramfs::take_along`].
pub fn entries() -> Result<Vec<String>> {
    let mut entries = Vec::new();
    for program in PROGRAMS {
        let real = fs::canonicalize(program).with_context(|| format!("{program}: scripts/setup installs it"))?;
        entries.push(format!("{}:{program}", real.display()));
    }
    // python3 is a link to its version, which names the directory of its library.
    let python = fs::canonicalize("/usr/bin/python3").context("/usr/bin/python3: scripts/setup installs it")?;
    let library = Path::new("/usr/lib").join(python.file_name().unwrap_or_default());
    entries.push(format!("{}:/usr/bin/python3", python.display()));
    entries.push(format!("{0}:{0}", library.display()));
    entries.push("/usr/share/gdb:/usr/share/gdb".to_string());
    let script = crate::paths::root().join("libdune/gdb/dune.py");
    entries.push(format!("{}:/usr/share/dune/gdb/dune.py", script.display()));
    // The compiler proper stands in a directory of its version.
    let compiler = newest(Path::new("/usr/lib/gcc/x86_64-linux-gnu"))?.join("cc1");
    entries.push(format!("{0}:{0}", compiler.display()));
    entries.push(format!("{}:/usr/bin/goroutines", goroutines()?.display()));
    Ok(entries)
}

/// Compiles `tests/programs/goroutines.go`, where it is newer than what it became before.
fn goroutines() -> Result<PathBuf> {
    let directory = crate::paths::target_dir().join("programs");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let source = crate::paths::root().join("tests/programs/goroutines.go");
    let program = directory.join("goroutines");
    // Two rows may want it at once.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    if changed(&program) > changed(&source) {
        return Ok(program);
    }
    let new = directory.join("goroutines.new");
    let status = Command::new("go")
        .args(["build", "-o"])
        .args([&new, &source])
        .env("GOCACHE", directory.join("go-cache"))
        .env("CGO_ENABLED", "1")
        .envs([("GOPROXY", "off"), ("GOTOOLCHAIN", "local"), ("GOFLAGS", "")])
        .status()
        .context("go: scripts/setup installs it")?;
    anyhow::ensure!(status.success(), "go build of {} failed", source.display());
    fs::rename(&new, &program).with_context(|| format!("renaming {}", new.display()))?;
    Ok(program)
}

/// The entry of a directory with the highest number as its name.
fn newest(dir: &Path) -> Result<PathBuf> {
    fs::read_dir(dir)
        .with_context(|| format!("reading {}", dir.display()))?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())))
        .filter(|(_, path)| path.join("cc1").is_file())
        .max()
        .map(|(_, path)| path)
        .with_context(|| format!("no compiler in {}", dir.display()))
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of the distribution that the tests run unmodified in Dune mode. `scripts/setup` installs them.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::Context;
use anyhow::Result;

use crate::image::Initramfs;

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

/// Adds them; `all`: what only the long tests run, too.
///
/// # Errors
///
/// One that is not installed, or does not build.
pub fn add(files: &mut Initramfs, all: bool) -> Result<()> {
    entries(all)?.iter().try_for_each(|entry| files.take_along(entry))
}

/// What goes along, in the form of [`Initramfs::take_along`].
fn entries(all: bool) -> Result<Vec<String>> {
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
    let compiler = newest(Path::new("/usr/lib/gcc/x86_64-linux-gnu"))?;
    entries.push(format!("{0}:{0}", compiler.join("cc1").display()));
    entries.push(format!("{0}:{0}", compiler.join("include").display()));
    entries.push("/usr/include/stdc-predef.h:/usr/include/stdc-predef.h".to_string());
    entries.push(format!("{}:/usr/bin/goroutines", goroutines()?.display()));
    if all {
        let java = java()?;
        entries.push(format!("{}:/usr/lib/java", java.display()));
        for program in ["bin/java", "lib/server/libjvm.so"] {
            entries.push(format!("{}:/usr/lib/java/{program}", java.join(program).display()));
        }
    }
    Ok(entries)
}

/// `tests/programs/goroutines.go`, compiled.
fn goroutines() -> Result<PathBuf> {
    made("goroutines", "goroutines.go", |source, new| {
        let cache = new.with_file_name("go-cache");
        succeeds(
            Command::new("go")
                .args(["build", "-o"])
                .args([new, source])
                .env("GOCACHE", cache)
                .env("CGO_ENABLED", "1")
                .envs([("GOPROXY", "off"), ("GOTOOLCHAIN", "local"), ("GOFLAGS", "")]),
        )
    })
}

/// The distribution's Java virtual machine with the one module that `tests/programs/Collected.java` needs, and that program:
/// the whole would take the emulated machine long to load.
fn java() -> Result<PathBuf> {
    made("java", "Collected.java", |source, new| {
        succeeds(
            Command::new("jlink")
                .args([
                    "--add-modules",
                    "java.base",
                    "--strip-java-debug-attributes",
                    "--vm",
                    "server",
                ])
                .args(["--no-header-files", "--no-man-pages", "--output"])
                .arg(new),
        )?;
        succeeds(
            Command::new(new.join("bin/java"))
                .arg("-Xshare:dump")
                .stdout(Stdio::null()),
        )?;
        succeeds(Command::new("javac").arg("-d").arg(new.join("classes")).arg(source))
    })
}

/// What `make` makes of a source of `tests/programs`, where that is newer than what it became before.
fn made(name: &str, source: &str, make: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
    let directory = crate::paths::target_dir().join("programs");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let source = crate::paths::root().join("tests/programs").join(source);
    let program = directory.join(name);
    // Two rows may want it at once.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    if changed(&program) > changed(&source) {
        return Ok(program);
    }
    let new = directory.join(format!("{name}.new"));
    for old in [&program, &new] {
        if old.is_dir() {
            fs::remove_dir_all(old).with_context(|| format!("removing {}", old.display()))?;
        }
    }
    make(&source, &new).with_context(|| format!("making {name} of {}", source.display()))?;
    fs::rename(&new, &program).with_context(|| format!("renaming {}", new.display()))?;
    Ok(program)
}

fn succeeds(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{:?}: scripts/setup installs it", command.get_program()))?;
    anyhow::ensure!(status.success(), "{command:?} failed");
    Ok(())
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

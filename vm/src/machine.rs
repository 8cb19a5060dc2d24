// SPDX-License-Identifier: MIT OR Apache-2.0
//! One run of one emulated machine.
//!
//! Bochs writes the guest's two serial lines to files that are followed while
//! it runs: the kernel's console, and the line on which `vm/guest/init` sends
//! the program's output between frames that carry the run's token.

use std::fs;
use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

use crate::image;
use crate::image::Initramfs;

/// What the machine is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The built tree of the kernel to boot.
    pub kernel_tree: PathBuf,
    /// A CPU model of Bochs, as `bochs -help cpu` lists them.
    pub cpu_model: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Instructions per second of guest time.
    pub ips: u32,
    /// More kernel arguments.
    pub append: String,
    /// Parameters of `dune.ko`; `None` leaves the module out.
    pub module_parameters: Option<Vec<String>>,
    /// Nothing in it is random or goes by the host's clock, so that two runs give the same figures.
    pub repeatable: bool,
}

/// What runs in it.
#[derive(Clone, Debug)]
pub struct Job {
    /// A shell command.
    pub command: String,
    /// Who runs it: `root`, `tester` or `outsider`.
    pub user: String,
    /// When the machine is stopped, counted from the start of the command.
    pub timeout: Duration,
}

/// How a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest sent its closing frame.
    Complete,
    /// The guest's kernel panicked.
    Panic,
    /// The emulator stopped by itself before the closing frame.
    EmulatorStopped,
    /// The time was up.
    TimedOut,
}

/// All that came back from a machine.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub end: End,
    /// The token of this run.
    pub token: String,
    /// The program's exit status, when its frame arrived.
    pub status: Option<i32>,
    /// The exit status of `dune-unload`, when it ran.
    pub unload: Option<i32>,
    /// What the program wrote.
    pub output: String,
    /// The kernel's console.
    pub console: String,
    /// The kernel's whole log, sent at the end.
    pub kernel_log: String,
    /// What the emulator itself said.
    pub emulator: String,
    /// When each frame came.
    pub times: String,
    pub elapsed: Duration,
}

/// Guest seconds are made of instructions. The fewer, the cheaper it is to wait
/// for devices and, with several CPUs, to be idle; a kernel that is busy with
/// checking itself needs more, or the timer tick is all it does. What is to be
/// measured is short beside the time between two ticks.
pub fn default_ips(kernel: &str) -> u32 {
    match kernel {
        "debug" => 200_000_000,
        "bench" => 500_000_000,
        _ => 50_000_000,
    }
}

/// What the command line of a kernel has besides.
pub fn arguments_of(kernel: &str) -> &'static str {
    if kernel == "newest" {
        // Only KVM may turn VMX on there. Linux warns of Bochs' CPUs, which say that they have hyper-threading, but not how.
        // And /proc/PID/mem is what a distribution makes of it.
        "dune_kvm=1 clearcpuid=ht proc_mem.force_override=always"
    } else {
        ""
    }
}

/// What a repeatable machine has instead of a random token and the time of day. Linux makes its random numbers of them, and
/// whether the clock's interrupt falls into what is measured is a matter of a few instructions long before. Bochs' screen
/// goes by the host's time unless told otherwise, and moves the other devices' timers.
const REPEATED_TOKEN: &str = "7265706561746564";
const REPEATED_TIME: &str = "clock: sync=none, time0=1767225600\nvga: extension=vbe, update_freq=1, realtime=0";
/// Bochs makes the answers of RDRAND and RDSEED of the host's time.
const REPEATED_ARGUMENTS: &str = "clearcpuid=rdrand,rdseed";

/// How often the serial lines are looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long a machine may take to start the command, and to end after it: fifty
/// times what it takes on an idle host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a panicking kernel may go on printing.
const PANIC_GRACE: Duration = Duration::from_secs(3);

/// A child that does not outlive this value, nor this process.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes a token that no earlier run can have left behind.
pub fn random_token() -> Result<String> {
    let mut bytes = [0u8; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A directory for one machine. Those of runs that were killed are removed.
fn machine_dir() -> Result<tempfile::TempDir> {
    const PREFIX: &str = "dune-vm.";
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('.'));
        if let Some((owner, _)) = owner {
            if !Path::new("/proc").join(owner).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    let prefix = format!("{PREFIX}{}.", std::process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir()?)
}

/// Boots `machine` with `files`, runs `job` and returns what came back. Each
/// line of the program goes to `sink` as it arrives.
///
/// # Errors
///
/// Only when the image cannot be made or the emulator cannot be started; what
/// happens inside the machine is in the [`Outcome`].
pub fn run(machine: &Machine, mut files: Initramfs, job: &Job, sink: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let (token, time, more) = if machine.repeatable {
        (REPEATED_TOKEN.to_string(), REPEATED_TIME, REPEATED_ARGUMENTS)
    } else {
        (random_token()?, "clock: sync=none", "")
    };
    let dir = machine_dir()?;
    let command = format!("#!/bin/sh\n{}\n", job.command);
    files.add_text("dune/command", &command, 0o755);
    let arguments = format!(
        "{} dune_token={token} dune_user={} {more} {}",
        kernel_arguments(machine),
        job.user,
        machine.append
    );
    let iso = make_iso(machine, &files, dir.path(), &arguments)?;

    let console_path = dir.path().join("console");
    let output_path = dir.path().join("output");
    let configuration = bochs_configuration(
        machine,
        dir.path(),
        &iso,
        time,
        &[
            format!("com1: enabled=1, mode=file, dev={}", console_path.display()),
            format!("com2: enabled=1, mode=file, dev={}", output_path.display()),
        ],
    );
    let started = Instant::now();
    let mut emulator = start_bochs(dir.path(), &configuration)?;

    let mut console = Follower::new(&console_path);
    let mut frames = Frames::new(&token);
    let mut output = Follower::new(&output_path);
    let mut panic_since: Option<Instant> = None;
    let end = loop {
        thread::sleep(POLL);
        let stopped = emulator.0.try_wait()?.is_some();
        console.read();
        output.read();
        while let Some(line) = output.next_line() {
            frames.take_line(&line, sink);
        }
        if frames.ended {
            break End::Complete;
        }
        if panic_since.is_none() && console.text().contains("Kernel panic - not syncing") {
            panic_since = Some(Instant::now());
        }
        if let Some(since) = panic_since {
            let done = console.text().contains("---[ end Kernel panic");
            if done || stopped || since.elapsed() > PANIC_GRACE {
                break End::Panic;
            }
        }
        if stopped {
            break End::EmulatorStopped;
        }
        let allowed = match (frames.begun, frames.status) {
            (Some(begun), None) => begun.elapsed() < job.timeout,
            _ => started.elapsed() < BOOT_TIMEOUT + job.timeout,
        };
        if !allowed {
            break End::TimedOut;
        }
    };
    drop(emulator);
    console.read();
    output.read();
    while let Some(line) = output.next_line() {
        frames.take_line(&line, sink);
    }
    frames.finish(sink);
    let emulator_log = ["bochs.out", "bochs.log"]
        .iter()
        .filter_map(|name| fs::read(dir.path().join(name)).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .collect();
    Ok(Outcome {
        end,
        token,
        status: frames.status,
        unload: frames.unload,
        output: frames.output,
        console: console.text().replace('\r', ""),
        kernel_log: frames.kernel_log,
        emulator: emulator_log,
        times: frames.times.trim_end_matches(", ").to_string(),
        elapsed: started.elapsed(),
    })
}

/// An interactive root shell on this terminal, the module loaded.
pub fn shell(machine: &Machine, files: Initramfs) -> Result<()> {
    let Ok(terminal) = File::options().read(true).write(true).open("/dev/tty") else {
        bail!("a shell needs a terminal: vm/boot runs a command without one");
    };
    drop(terminal);
    let dir = machine_dir()?;
    let (rows, columns) = window_size();
    let term = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let arguments = format!(
        "{} dune_shell=1 dune_rows={rows} dune_cols={columns} dune_term={term} {}",
        kernel_arguments(machine),
        machine.append
    );
    let iso = make_iso(machine, &files, dir.path(), &arguments)?;
    let configuration = bochs_configuration(
        machine,
        dir.path(),
        &iso,
        // Idle guest time runs far too fast for a human without this.
        "clock: sync=slowdown",
        &["com1: enabled=1, mode=term, dev=/dev/tty".to_string()],
    );
    let saved = Command::new("stty")
        .arg("-g")
        .stdin(File::open("/dev/tty")?)
        .output()
        .context("running stty")?;
    let result = start_bochs(dir.path(), &configuration).and_then(|mut emulator| {
        emulator.0.wait()?;
        Ok(())
    });
    let state = String::from_utf8_lossy(&saved.stdout).trim().to_string();
    Command::new("stty")
        .arg(state)
        .stdin(File::open("/dev/tty")?)
        .stderr(Stdio::null())
        .status()?;
    result
}

fn window_size() -> (u16, u16) {
    // SAFETY: winsize is plain data, all zeroes is a value of it.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes one winsize, and `size` is one.
    let result = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &mut size) };
    if result == 0 && size.ws_row > 0 {
        (size.ws_row, size.ws_col)
    } else {
        (24, 80)
    }
}

/// The kernel arguments of every machine. A warning ends the machine: the host
/// stops it when it sees the panic. The console is silent until `init` turns
/// warnings on, because the emulated serial line costs 60 ms per line.
fn kernel_arguments(machine: &Machine) -> String {
    let load = match &machine.module_parameters {
        None => "no".to_string(),
        Some(parameters) => parameters.join(","),
    };
    format!(
        "console=ttyS0 loglevel=3 panic_on_warn=1 oops=panic softlockup_panic=1 panic=0 \
         tsc=reliable tsc_early_khz={} no_timer_check lpj={} idle=halt cpuidle.off=1 reboot=t random.trust_bootloader=on \
         dune_load={load}",
        // The TSC counts instructions; CPUID names the real CPU's frequency, where it does. Of a clock that goes by that the
        // timer, which goes by the emulated bus, is always early, and is set again and again.
        machine.ips / 1000,
        // What the kernel would measure; HZ is 250.
        machine.ips / 250
    )
}

fn make_iso(machine: &Machine, files: &Initramfs, dir: &Path, arguments: &str) -> Result<PathBuf> {
    let initramfs = dir.join("initramfs");
    files.write(&initramfs)?;
    let bzimage = machine.kernel_tree.join("arch/x86/boot/bzImage");
    let iso = image::write_iso(dir, &bzimage, &initramfs, arguments)?;
    Ok(iso)
}

/// Most memory that Bochs takes of the host, in MiB; of a machine that has more and uses it, it keeps the rest in a file.
const HOST_MIB: u32 = 2048;

fn bochs_configuration(machine: &Machine, dir: &Path, iso: &Path, time: &str, serial: &[String]) -> String {
    let Machine {
        cpu_model,
        cpus,
        memory_mib,
        ips,
        ..
    } = machine;
    // A triple fault of the guest stops the emulator instead of starting the
    // guest again.
    format!(
        "cpu: model={cpu_model}, count={cpus}, ips={ips}, quantum=32, reset_on_triple_fault=0\n\
         memory: guest={memory_mib}, host={}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         ata0-master: type=cdrom, path={}, status=inserted\n\
         boot: cdrom\n\
         pci: enabled=1, chipset=i440fx, slot1=pcivga\n\
         {time}\n\
         display_library: rfb, options=\"timeout=0\"\n\
         {}\n\
         log: {}\n\
         panic: action=fatal\n\
         error: action=report\n\
         info: action=ignore\n\
         debug: action=ignore\n",
        memory_mib.min(&HOST_MIB),
        iso.display(),
        serial.join("\n"),
        dir.join("bochs.log").display(),
    )
}

fn start_bochs(dir: &Path, configuration: &str) -> Result<Emulator> {
    fs::write(dir.join("bochsrc"), configuration)?;
    // Debian's Bochs has its debugger built in: `c` starts the machine.
    fs::write(dir.join("commands"), "c\n")?;
    let out = File::create(dir.join("bochs.out"))?;
    let mut command = Command::new("bochs");
    command
        .args(["-q", "-f"])
        .arg(dir.join("bochsrc"))
        .arg("-rc")
        .arg(dir.join("commands"))
        .current_dir(dir)
        .stdin(Stdio::null())
        .stderr(out.try_clone()?)
        .stdout(out);
    // SAFETY: prctl is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let child = command.spawn().context("starting bochs: run scripts/setup")?;
    Ok(Emulator(child))
}

/// Reads a file that grows.
struct Follower {
    path: PathBuf,
    read: u64,
    bytes: Vec<u8>,
    /// Start of the first line not handed out yet.
    line_start: usize,
}

impl Follower {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            read: 0,
            bytes: Vec::new(),
            line_start: 0,
        }
    }

    fn read(&mut self) {
        let Ok(mut file) = File::open(&self.path) else {
            return;
        };
        if file.seek(SeekFrom::Start(self.read)).is_err() {
            return;
        }
        if let Ok(count) = file.read_to_end(&mut self.bytes) {
            self.read += count as u64;
        }
    }

    /// The next whole line without its end.
    fn next_line(&mut self) -> Option<String> {
        let rest = &self.bytes[self.line_start..];
        let length = rest.iter().position(|&byte| byte == b'\n')?;
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.line_start += length + 1;
        Some(line)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Takes the second serial line apart.
struct Frames {
    prefix: String,
    started: Instant,
    /// When the command was started.
    begun: Option<Instant>,
    section: Section,
    output: String,
    /// A line of output is held back until the next one comes, because a frame
    /// starts with a line end that is not the program's.
    held: Option<String>,
    kernel_log: String,
    status: Option<i32>,
    unload: Option<i32>,
    ended: bool,
    /// When each frame came, for `--verbose`.
    times: String,
}

#[derive(PartialEq, Eq)]
enum Section {
    Before,
    Output,
    Between,
    Log,
}

impl Frames {
    fn new(token: &str) -> Self {
        Self {
            prefix: format!("@dune {token} "),
            started: Instant::now(),
            begun: None,
            section: Section::Before,
            output: String::new(),
            held: None,
            kernel_log: String::new(),
            status: None,
            unload: None,
            ended: false,
            times: String::new(),
        }
    }

    fn take_line(&mut self, line: &str, sink: &mut dyn FnMut(&str)) {
        if let Some(frame) = line.strip_prefix(&self.prefix) {
            let mut words = frame.split_whitespace();
            let word = words.next().unwrap_or_default();
            let number = words.next().and_then(|word| word.parse().ok());
            if self.section == Section::Output {
                self.finish(sink);
            }
            let seconds = self.started.elapsed().as_secs_f64();
            self.times.push_str(&format!("{frame} {seconds:.1} s, "));
            match word {
                "begin" => {
                    self.begun = Some(Instant::now());
                    self.section = Section::Output;
                }
                "status" => {
                    self.status = number;
                    self.section = Section::Between;
                }
                "unload" => self.unload = number,
                "log" => self.section = Section::Log,
                "end" => {
                    self.ended = true;
                    self.section = Section::Before;
                }
                _ => {}
            }
            return;
        }
        match self.section {
            Section::Before => {}
            Section::Output => {
                if let Some(held) = self.held.replace(line.to_string()) {
                    self.emit(&held, sink);
                }
            }
            Section::Between => self.kernel_log.push_str(&format!("{line}\n")),
            Section::Log => self.kernel_log.push_str(&format!("{line}\n")),
        }
    }

    /// Hands out the line held back, unless it is the empty one before a frame.
    fn finish(&mut self, sink: &mut dyn FnMut(&str)) {
        if let Some(held) = self.held.take() {
            if !held.is_empty() {
                self.emit(&held, sink);
            }
        }
    }

    fn emit(&mut self, line: &str, sink: &mut dyn FnMut(&str)) {
        self.output.push_str(line);
        self.output.push('\n');
        sink(line);
    }
}

#[cfg(test)]
mod tests {
    use super::Frames;

    fn feed(text: &str) -> (Frames, String) {
        let mut frames = Frames::new("00ff");
        let mut seen = String::new();
        for line in text.lines() {
            frames.take_line(line, &mut |line| seen.push_str(&format!("{line}|")));
        }
        (frames, seen)
    }

    #[test]
    fn output_status_and_log_are_told_apart() {
        let (frames, seen) = feed(
            "noise\n\n@dune 00ff begin\nhello\n\nworld\n\n@dune 00ff status 3\n\n@dune 00ff unload 0\n\n@dune 00ff log\n[0] x\n\n@dune 00ff end\n",
        );
        assert_eq!(seen, "hello||world|");
        assert_eq!(frames.output, "hello\n\nworld\n");
        assert_eq!(frames.status, Some(3));
        assert_eq!(frames.unload, Some(0));
        assert!(frames.kernel_log.contains("[0] x"));
        assert!(frames.ended);
    }

    #[test]
    fn output_without_a_line_end_is_kept() {
        let (frames, seen) = feed("\n@dune 00ff begin\nhalf\n@dune 00ff status 0\n");
        assert_eq!(seen, "half|");
        assert!(!frames.ended);
    }

    #[test]
    fn a_frame_with_another_token_is_output() {
        let (frames, seen) = feed("\n@dune 00ff begin\n@dune 1111 end\nx\n");
        assert_eq!(seen, "@dune 1111 end|");
        assert!(!frames.ended);
    }
}

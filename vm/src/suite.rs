// SPDX-License-Identifier: MIT OR Apache-2.0
//! `make test`: the parts, the matrix, one sum.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::bail;
use anyhow::Context;
use anyhow::Result;

use crate::bench;
use crate::heavy;
use crate::host;
use crate::image::Initramfs;
use crate::ktap::Report;
use crate::ktap::Status;
use crate::machine;
use crate::machine::Job;
use crate::machine::Machine;
use crate::machine::Outcome;
use crate::matrix;
use crate::matrix::Expect;
use crate::matrix::Row;
use crate::paths;
use crate::programs;
use crate::results;
use crate::results::Whole;
use crate::verdict;

/// Sums over everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// The closing line of `make test`.
    pub fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// One finished row.
struct Finished {
    row: Row,
    report: Report,
    sum: Sum,
}

/// What to run.
pub struct Options {
    pub long: bool,
    /// Only rows whose name holds one of these, long ones too; empty for all.
    pub rows: Vec<String>,
    /// The machines of the reference kernel, with the newest packaged one.
    pub newest: bool,
    /// How many machines run at a time.
    pub jobs: usize,
}

/// The rows that the options mean.
///
/// # Errors
///
/// A name that no row holds.
fn chosen(options: &Options) -> Result<Vec<Row>> {
    let all = |long: bool| {
        let mut rows = matrix::rows(long);
        if options.newest {
            rows.retain(|row| row.kernel == "test");
            rows.iter_mut().for_each(|row| row.kernel = "newest");
        }
        rows
    };
    if options.rows.is_empty() {
        return Ok(all(options.long));
    }
    let mut rows = all(true);
    for name in &options.rows {
        if !rows.iter().any(|row| row.name.contains(name.as_str())) {
            bail!("no row's name holds {name:?}: dune-vm rows lists them");
        }
    }
    rows.retain(|row| options.rows.iter().any(|name| row.name.contains(name.as_str())));
    Ok(rows)
}

/// Runs all parts and returns the sum.
pub fn run(options: &Options) -> Result<Sum> {
    let rows = chosen(options)?;
    let mut modules = Modules::new();
    let whole = options.rows.is_empty().then_some(Whole {
        long: options.long,
        newest: options.newest,
    });
    if whole.is_some() {
        results::forget(options.newest)?;
    }
    if options.newest || whole.is_none() {
        let mut total = part("kernels and modules", || build(&rows, &mut modules))?;
        total.add(part("machines", || machines(rows, &modules, options.jobs, whole))?);
        return Ok(total);
    }
    let mut total = Sum::default();
    match host::why_not_native() {
        Some(reason) => println!("== native: not on this machine itself, because {reason}"),
        None => total.add(part("native", || native(NATIVE))?),
    }
    // What cargo builds and what the kernel's make does, at the same time: neither keeps two cores busy.
    let script = |name: &'static str| part(name, || command_part(name, Command::new(format!("scripts/{name}"))));
    total.add(both(
        || {
            let mut sum = part("host tests", host_tests)?;
            sum.add(script("check")?);
            Ok(sum)
        },
        || {
            let mut sum = part("kernels and modules", || build(&rows, &mut modules))?;
            sum.add(script("test-kbuild")?);
            sum.add(script("test-external-app")?);
            sum.add(script("test-install")?);
            sum.add(script("test-shell")?);
            Ok(sum)
        },
    )?);
    // Costs are instructions: what else runs does not matter.
    total.add(both(
        || part("bench", costs),
        || part("machines", || machines(rows, &modules, options.jobs, whole)),
    )?);
    Ok(total)
}

/// Runs two things at the same time.
fn both(aside: impl FnOnce() -> Result<Sum> + Send, here: impl FnOnce() -> Result<Sum>) -> Result<Sum> {
    thread::scope(|scope| {
        let aside = scope.spawn(aside);
        let here = here();
        let mut sum = aside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        sum.add(here?);
        Ok(sum)
    })
}

/// Compares what the operations cost with the committed figures, and sees to it that what is heavy is counted.
fn costs() -> Result<Sum> {
    let mut sum = Sum::default();
    let mut told = |name: &str, holds: bool| {
        println!("{} {name}", if holds { "ok" } else { "not ok" });
        sum.passed += usize::from(holds);
        sum.failed += usize::from(!holds);
    };
    let (places, wrong) = heavy::look(&paths::module("bench", Some("DUNE_COUNT_OPS=y"))?)?;
    for place in &wrong {
        println!("    {place}");
    }
    println!("    {places} heavy operations in the module");
    told("heavy_operations_are_counted_where_they_are", wrong.is_empty());
    told("costs_are_as_committed", bench::check_baseline()?);
    Ok(sum)
}

/// How often a part that goes on says so.
const STILL_THERE: Duration = Duration::from_secs(60);

/// Runs a part, prints its name and its time, which it also tells meanwhile.
fn part(name: &str, run: impl FnOnce() -> Result<Sum>) -> Result<Sum> {
    println!("== {name}");
    let started = Instant::now();
    let (end, ended) = mpsc::channel::<()>();
    let sum = thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(STILL_THERE) == Err(mpsc::RecvTimeoutError::Timeout) {
                println!("== {name}: {} s so far", started.elapsed().as_secs());
            }
        });
        let sum = run().with_context(|| name.to_string());
        drop(end);
        sum
    })?;
    println!("== {name}: {}, {} s", sum.line(), started.elapsed().as_secs());
    Ok(sum)
}

/// A command that counts as one test.
fn command_part(name: &str, mut command: Command) -> Result<Sum> {
    let status = command
        .current_dir(paths::root())
        .status()
        .with_context(|| format!("running {name}"))?;
    Ok(Sum {
        passed: usize::from(status.success()),
        failed: usize::from(!status.success()),
        skipped: 0,
    })
}

/// On this very machine: the short suite, and what only a real CPU has.
pub const NATIVE: &str = "dune-tests run --suite short --suite native";

/// A command that runs tests, on this very machine: asked for as much as an emulated one is.
///
/// # Errors
///
/// As [`host::capture`].
pub fn native(command: &str) -> Result<Sum> {
    let captured = host::capture(command, &host::Module::ForTests)?;
    let report = Report::parse(&captured.output);
    let mut faults = verdict::bad_lines(&captured.kernel_log);
    faults.truncate(20);
    if captured.kernel_log.contains(host::OVERWRITTEN) {
        faults.push(format!("the kernel's log is not whole {}", host::OVERWRITTEN));
    }
    faults.extend(told_faults(
        &captured.output,
        &captured.token,
        Some(captured.status),
        &report,
    ));
    let (passed, failed, skipped) = report.counts();
    let own = faults.len() > failed;
    if !faults.is_empty() {
        print!("{}", captured.output);
        for fault in faults {
            println!("    {fault}");
        }
    }
    Ok(Sum {
        passed,
        failed: failed + usize::from(own),
        skipped,
    })
}

fn host_tests() -> Result<Sum> {
    let output = Command::new("cargo")
        .args(["test", "--workspace", "--no-fail-fast", "--color", "never"])
        .current_dir(paths::root())
        .stderr(std::process::Stdio::piped())
        .output()
        .context("running cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut sum = cargo_sum(&text);
    if !output.status.success() {
        println!("{}{}", String::from_utf8_lossy(&output.stderr), text);
        // It may have failed before any test could.
        sum.failed = sum.failed.max(1);
    }
    Ok(sum)
}

/// Adds up cargo's `test result:` lines.
fn cargo_sum(text: &str) -> Sum {
    let mut sum = Sum::default();
    for line in text.lines().filter(|line| line.starts_with("test result:")) {
        for field in line.split([';', '.']) {
            let mut words = field.split_whitespace();
            let (Some(Ok(number)), Some(word)) = (words.next().map(str::parse::<usize>), words.next()) else {
                continue;
            };
            match word {
                "passed" => sum.passed += number,
                "failed" => sum.failed += number,
                "ignored" => sum.skipped += number,
                _ => {}
            }
        }
    }
    sum
}

/// Why a test with `Need::OwnVmx` (tests/src/framework.rs) is skipped.
const KVM_FIRST: &str = "KVM has VMX from the start";

/// The modules that the rows need, by kernel and variant.
type Modules = BTreeMap<(&'static str, Option<&'static str>), PathBuf>;

/// Builds every kernel and module that the rows need, before any clock runs.
fn build(rows: &[Row], modules: &mut Modules) -> Result<Sum> {
    for row in rows {
        paths::kernel_tree(row.kernel)?;
        let key = (row.kernel, row.variant);
        if row.needs_module() && !modules.contains_key(&key) {
            modules.insert(key, paths::module(row.kernel, row.variant)?);
        }
    }
    Ok(Sum::default())
}

/// `whole`: these are all rows.
fn machines(rows: Vec<Row>, modules: &Modules, jobs: usize, whole: Option<Whole>) -> Result<Sum> {
    let queue = Mutex::new(VecDeque::from(rows));
    let finished: Mutex<Vec<Finished>> = Mutex::new(Vec::new());
    let error: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| loop {
                let Some(row) = lock(&queue).pop_front() else {
                    return;
                };
                match run_row(row, modules) {
                    Ok(result) => lock(&finished).push(result),
                    Err(problem) => {
                        *lock(&error) = Some(problem);
                        lock(&queue).clear();
                    }
                }
            });
        }
    });
    if let Some(problem) = lock(&error).take() {
        return Err(problem);
    }
    let finished = finished.into_inner().unwrap_or_else(|poison| poison.into_inner());
    let mut sum = Sum::default();
    for result in &finished {
        sum.add(result.sum);
    }
    let skipped = skipped_everywhere(&finished);
    // Of some rows only it may be what another is for; the machines of the newest kernel begin with KVM loaded.
    let is_excused = |reasons: &BTreeSet<&str>| {
        whole.is_some_and(|whole| whole.newest) && reasons.iter().all(|reason| *reason == KVM_FIRST)
    };
    for (name, reasons) in &skipped {
        let is_wrong = whole.is_some() && !is_excused(reasons);
        let ok = if is_wrong { "not ok" } else { "#" };
        println!("{ok} {name}: skipped on every machine");
        sum.failed += usize::from(is_wrong);
    }
    if let Some(whole) = whole {
        let mut ran: BTreeSet<&str> = finished.iter().flat_map(passed).collect();
        ran.extend(
            skipped
                .iter()
                .filter(|(_, reasons)| is_excused(reasons))
                .map(|(name, _)| *name),
        );
        for name in results::never_ok(&ran, whole)? {
            println!("not ok {name}: docs/tests.md names it, and it ran ok on no machine");
            // One that failed or was skipped is counted already.
            let mut counted = finished.iter().flat_map(|result| {
                result
                    .report
                    .results
                    .iter()
                    .map(|test| &test.name)
                    .chain([&result.row.name])
            });
            sum.failed += usize::from(!counted.any(|other| *other == name));
        }
    }
    Ok(sum)
}

/// The tests that ran `ok` on a machine that has to be green; and the machine itself, if it came to what it must come to.
fn passed(result: &Finished) -> impl Iterator<Item = &str> {
    let green = result.row.expect == Expect::Green;
    let results = result.report.results.iter();
    let itself = (result.sum.failed == 0).then_some(result.row.name.as_str());
    results
        .filter(move |test| green && test.status == Status::Passed)
        .map(|test| test.name.as_str())
        .chain(itself)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Tests that no machine of the matrix ran, and why not.
fn skipped_everywhere(finished: &[Finished]) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut skipped: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut ran = BTreeSet::new();
    for result in finished.iter().filter(|f| f.row.expect == Expect::Green) {
        for test in &result.report.results {
            if let Status::Skipped(reason) = &test.status {
                skipped.entry(&test.name).or_default().insert(reason);
            } else {
                ran.insert(test.name.as_str());
            }
        }
    }
    skipped.retain(|name, _| !ran.contains(name));
    skipped
}

fn run_row(mut row: Row, modules: &Modules) -> Result<Finished> {
    let kernel_tree = paths::kernel_tree(row.kernel)?;
    let mut files = Initramfs::base(&kernel_tree)?;
    let module = modules.get(&(row.kernel, row.variant));
    files.add_built(module.map(PathBuf::as_path))?;
    if row.debian_programs {
        programs::add(&mut files, row.when == matrix::When::Long)?;
    }
    let variable = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let mut command = row.lengthen(variable);
    if row.harness {
        command = format!("{}\n{command}", files.add_harness()?);
    }
    let parameters = row.gpa_bits.map(|bits| format!("gpa_bits={bits}"));
    let machine = Machine {
        kernel_tree,
        cpu_model: row.cpu_model.to_string(),
        cpus: row.cpus,
        memory_mib: row.memory_mib,
        ips: machine::default_ips(row.kernel),
        append: format!(
            "{} {} {}",
            if row.kernel == "debug" { "dune_leaks=1" } else { "" },
            machine::arguments_of(row.kernel),
            row.append
        ),
        module_parameters: row.load.then(|| parameters.into_iter().collect()),
        repeatable: false,
    };
    let job = Job {
        command,
        user: "root".to_string(),
        timeout: Duration::from_secs(row.timeout_s),
    };
    let outcome = machine::run(&machine, files, &job, &mut |_| {})?;
    let report = Report::parse(&outcome.output);
    let faults = faults(&outcome, &report);
    let (sum, text) = judge(&row, &outcome, &report, &faults);
    print!("{text}");
    let finished = Finished { row, report, sum };
    results::write(&finished.row, passed(&finished))?;
    Ok(finished)
}

/// All that keeps a row from being green.
fn faults(outcome: &Outcome, report: &Report) -> Vec<String> {
    let mut faults = verdict::problems(outcome);
    faults.extend(told_faults(&outcome.output, &outcome.token, outcome.status, report));
    faults
}

/// What is wrong by what the tests wrote and how their runner ended.
fn told_faults(output: &str, token: &str, status: Option<i32>, report: &Report) -> Vec<String> {
    let mut faults = Vec::new();
    for result in report.results.iter().filter(|r| r.status == Status::Failed) {
        faults.push(format!("not ok {}", result.name));
    }
    faults.extend(report.defects());
    let closing = format!("# dune-tests end {token}");
    if !output.lines().any(|line| line == closing) {
        faults.push("the token did not come back at the end".to_string());
    }
    // With status 1 the runner says what the results already do.
    let told = i32::from(report.counts().1 != 0);
    if let Some(status) = status.filter(|status| *status != told) {
        faults.push(format!("the program ended with status {status}"));
    }
    faults
}

/// Counts a row and words its report. The row itself counts as one test.
fn judge(row: &Row, outcome: &Outcome, report: &Report, faults: &[String]) -> (Sum, String) {
    let seconds = outcome.elapsed.as_secs_f64();
    match row.expect {
        Expect::Green => {
            let (passed, failed, skipped) = report.counts();
            // Faults of the row itself are those that are no test's.
            let own = faults.len() > failed;
            let sum = Sum {
                passed: passed + usize::from(!own),
                failed: failed + usize::from(own),
                skipped,
            };
            let mut text = format!(
                "{} {}: {}, {seconds:.0} s\n",
                if faults.is_empty() { "ok" } else { "not ok" },
                row.name,
                sum.line()
            );
            let slowest: Vec<String> = report
                .slowest(4)
                .iter()
                .map(|result| format!("{} {} ms", result.name, result.milliseconds.unwrap_or(0)))
                .collect();
            text.push_str(&format!("    slowest, in guest time: {}\n", slowest.join(", ")));
            for result in &report.results {
                if let Status::Skipped(reason) = &result.status {
                    text.push_str(&format!("    skipped {}: {reason}\n", result.name));
                }
            }
            if !faults.is_empty() {
                for fault in faults {
                    text.push_str(&format!("    {fault}\n"));
                }
                for line in interesting(&outcome.output) {
                    text.push_str(&format!("    | {line}\n"));
                }
                if own {
                    for line in tail(&outcome.console, 40) {
                        text.push_str(&format!("    > {line}\n"));
                    }
                }
            }
            (sum, text)
        }
        Expect::Red(expected) => {
            let unmatched = unmatched(faults, expected);
            let sum = Sum {
                passed: usize::from(unmatched.is_empty()),
                failed: usize::from(!unmatched.is_empty()),
                skipped: 0,
            };
            let verdict = if unmatched.is_empty() { "ok" } else { "not ok" };
            let mut text = format!("{verdict} {}: red as it must be, {seconds:.0} s\n", row.name);
            if !unmatched.is_empty() {
                text = format!("{verdict} {}: {seconds:.0} s\n", row.name);
                for line in unmatched {
                    text.push_str(&format!("    {line}\n"));
                }
            }
            (sum, text)
        }
    }
}

/// Compares the faults of a run with those it must have. A panic's own lines in
/// the log may come along with the fault that names it.
fn unmatched(faults: &[String], expected: &[&str]) -> Vec<String> {
    let mut lines = Vec::new();
    for text in expected {
        if !faults.iter().any(|fault| fault.contains(text)) {
            lines.push(format!("not seen: {text}"));
        }
    }
    let panicked = expected.iter().any(|text| text.contains("panicked"));
    for fault in faults {
        let known = expected.iter().any(|text| fault.contains(text));
        let follows = panicked && fault.starts_with("in the kernel's log:");
        if !(known || follows) {
            lines.push(format!("not expected: {fault}"));
        }
    }
    lines
}

/// The diagnostics and failures of a KTAP stream, without what passed.
fn interesting(output: &str) -> Vec<&str> {
    output
        .lines()
        .filter(|line| !line.starts_with("ok ") && !line.starts_with("KTAP") && !line.starts_with("1.."))
        .collect()
}

fn tail(text: &str, count: usize) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::cargo_sum;
    use super::chosen;
    use super::unmatched;
    use super::Options;
    use super::Sum;
    use crate::matrix;

    fn row_count(long: bool, names: &[&str]) -> Option<usize> {
        let rows = names.iter().map(|name| name.to_string()).collect();
        chosen(&Options {
            long,
            rows,
            newest: false,
            jobs: 1,
        })
        .ok()
        .map(|rows| rows.len())
    }

    #[test]
    fn rows_are_found_in_the_whole_matrix() {
        assert_eq!(row_count(false, &[]), Some(matrix::rows(false).len()));
        assert_eq!(row_count(true, &[]), Some(matrix::rows(true).len()));
        assert_eq!(row_count(false, &["self-oops"]), Some(1));
        let long = &matrix::rows(true)[0].name;
        assert!(long.starts_with("long-"));
        assert_eq!(row_count(false, &[long]), Some(1));
    }

    #[test]
    fn a_name_that_no_row_has_is_an_error() {
        assert_eq!(row_count(false, &["no-such-row"]), None);
        assert_eq!(row_count(true, &["self-oops", "no-such-row"]), None);
    }

    #[test]
    fn cargo_results_are_added_up() {
        let text = "test a ... ok\n\
            test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.02s\n";
        let expected = Sum {
            passed: 6,
            failed: 2,
            skipped: 1,
        };
        assert_eq!(cargo_sum(text), expected);
        assert_eq!(expected.line(), "6 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn a_red_row_must_be_red_for_its_reason() {
        let faults = vec!["not ok x".to_string()];
        assert!(unmatched(&faults, &["not ok x"]).is_empty());
        assert_eq!(unmatched(&faults, &["token"]).len(), 2);
        assert_eq!(unmatched(&[], &["token"]).len(), 1);
    }
}

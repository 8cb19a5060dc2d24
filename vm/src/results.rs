// SPDX-License-Identifier: MIT OR Apache-2.0
//! What ran `ok`, kept in `target/test-results/` and compared with docs/tests.md.
//!
//! For each machine a file `ROW.ok` with the names of the tests that ran `ok` there and, where the machine came to what it must
//! come to, its own name. After a whole run a file `whole`: in its first line the commit and `short` or `long`, then what
//! docs/tests.md names and what did not run `ok`. The same for `KERNEL=newest`, in `newest/`.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;

use crate::matrix;
use crate::matrix::Row;
use crate::matrix::When;
use crate::paths;

/// A run of all machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// With the long ones.
    pub long: bool,
    /// Those of the reference kernel, with the newest packaged one.
    pub newest: bool,
}

fn directory(newest: bool) -> PathBuf {
    let directory = paths::target_dir().join("test-results");
    if newest {
        directory.join("newest")
    } else {
        directory
    }
}

/// The files of earlier runs.
fn files(newest: bool) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory(newest)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context("reading target/test-results")?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.context("reading target/test-results")?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Throws away what earlier runs left, of that kernel.
pub fn forget(newest: bool) -> Result<()> {
    for file in files(newest)? {
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    }
    Ok(())
}

/// Writes what ran `ok` on the machine `row`, to `ROW.ok`, one name a line.
pub fn write<'a>(row: &Row, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let text: String = names.map(|name| format!("{name}\n")).collect();
    let directory = directory(row.kernel == "newest");
    fs::create_dir_all(&directory)?;
    let path = directory.join(format!("{}.ok", row.name));
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// All names that those files hold.
fn ran_ok(newest: bool) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for file in files(newest)? {
        if file.extension().is_some_and(|extension| extension == "ok") {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            names.extend(text.lines().map(str::to_string));
        }
    }
    Ok(names)
}

/// What docs/tests.md names, what such a run goes through, and what is not in `ran`. Writes the file `whole`.
pub fn never_ok(ran: &BTreeSet<&str>, whole: Whole) -> Result<Vec<String>> {
    let mut missing = named(whole)?;
    missing.retain(|name| !ran.contains(name.as_str()));
    // Without git there is nothing to compare a later state with.
    if let Some(head) = git(&["rev-parse", "HEAD"]) {
        let length = if whole.long { "long" } else { "short" };
        let mut text = format!("{} {length}\n", head.trim());
        text.extend(missing.iter().map(|name| format!("{name}\n")));
        let directory = directory(whole.newest);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("whole"), text).context("writing target/test-results/whole")?;
    }
    Ok(missing)
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(paths::root())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What docs/tests.md names and a run goes through.
fn named(whole: Whole) -> Result<Vec<String>> {
    let document = fs::read_to_string(paths::root().join("docs/tests.md")).context("reading docs/tests.md")?;
    let program = paths::target_dir().join("release/dune-tests");
    let list = Command::new(&program).arg("list").output();
    let list = list.with_context(|| format!("running {}", program.display()))?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    Ok(expected(&document, &list, &matrix::rows(true), whole))
}

/// The same from the texts: the document, and what `dune-tests list` says; and the matrix.
fn expected(document: &str, list: &str, rows: &[Row], whole: Whole) -> Vec<String> {
    let tests: BTreeMap<&str, &str> = list
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let suite = words.next()?;
            Some((words.nth(1)?, suite))
        })
        .collect();
    let runs_test = |name: &str| match tests.get(name) {
        // Other kinds of test, which other parts of a run count.
        None => false,
        Some(&"native" | &"harness") => false,
        Some(&"debug") => !whole.newest,
        Some(suite) => whole.long || !suite.contains("long"),
    };
    let runs_row = |name: &str| {
        let row = rows.iter().find(|row| row.name == name);
        row.is_some_and(|row| (whole.long || row.when == When::Always) && (!whole.newest || row.kernel == "test"))
    };
    let names: BTreeSet<&str> = document
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|name| runs_test(name) || runs_row(name))
        .collect();
    names.into_iter().map(str::to_string).collect()
}

/// What is known of docs/tests.md by the last whole runs that are here: a line for each kernel, and whether all is well.
pub fn tell() -> Result<(Vec<String>, bool)> {
    let mut lines = Vec::new();
    let mut is_well = true;
    for newest in [false, true] {
        let prefix = if newest { "KERNEL=newest: " } else { "" };
        let text = match fs::read_to_string(directory(newest).join("whole")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let rest = if newest { "" } else { ": only names were checked" };
                lines.push(format!("{prefix}no whole run here{rest}"));
                continue;
            }
            text => text.context("reading target/test-results/whole")?,
        };
        let Some((commit, long, missing)) = parse(&text) else {
            lines.push(format!(
                "{prefix}target/test-results/whole is not what `make test` writes"
            ));
            is_well = false;
            continue;
        };
        let changed = git(&["diff", "--name-only", commit]).map(|names| names.lines().count());
        let whole = Whole { long, newest };
        let compared = compare(&named(whole)?, &missing, &ran_ok(newest)?);
        lines.push(format!("{prefix}{}", compared.words(commit, long, changed)));
        lines.extend(
            compared
                .never
                .iter()
                .map(|name| format!("{prefix}{name} ran ok on no machine")),
        );
        is_well &= compared.never.is_empty();
    }
    Ok((lines, is_well))
}

/// Commit, length and names of a file `whole`.
fn parse(text: &str) -> Option<(&str, bool, BTreeSet<&str>)> {
    let mut lines = text.lines();
    let (commit, length) = lines.next()?.split_once(' ')?;
    let long = match length {
        "long" => true,
        "short" => false,
        _ => return None,
    };
    Some((commit, long, lines.collect()))
}

/// What docs/tests.md names now, beside what ran.
#[derive(Debug, PartialEq, Eq)]
struct Compared {
    ran: usize,
    /// Was there in the whole run, and never ran `ok`.
    never: Vec<String>,
    /// Came since, and was not run.
    new: Vec<String>,
}

fn compare(named: &[String], missing: &BTreeSet<&str>, ran: &BTreeSet<String>) -> Compared {
    let (ran, others): (Vec<_>, Vec<_>) = named.iter().cloned().partition(|name| ran.contains(name));
    let (never, new) = others.into_iter().partition(|name| missing.contains(name.as_str()));
    Compared {
        ran: ran.len(),
        never,
        new,
    }
}

impl Compared {
    /// `changed`: how many files differ from that commit, if it is known.
    fn words(&self, commit: &str, long: bool, changed: Option<usize>) -> String {
        let command = if long { "make test-long" } else { "make test" };
        let changed = changed.map_or_else(
            || "which git does not know".to_string(),
            |count| format!("{count} files changed since"),
        );
        let new = match &self.new[..] {
            [] => String::new(),
            names => format!(
                "; {} are newer than it and did not run: {}",
                names.len(),
                names.join(", ")
            ),
        };
        format!(
            "compared with the whole `{command}` of {}, {changed}: {} ran ok, {} never{new}",
            commit.get(..12).unwrap_or(commit),
            self.ran,
            self.never.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::compare;
    use super::expected;
    use super::parse;
    use super::Compared;
    use super::Whole;
    use crate::matrix::rows;

    const DOCUMENT: &str = "`not_in_a_table`\n| Clause | Tests |\n|---|---|\n| a | `one`, `two` |\n| b | `two`, `three` |\n\
                            | c | no test yet |\n| d | `a_host_test`, `real`, `red`, `hours`, `mutant-leaks-a-page`, `kexec` |\n\
                            | e | `no-such-row`, `long-protection-keys`, `self-kmemleak`, `long-hugetlb-1g` |\n";
    const LIST: &str =
        "short    tester    one\nshort    root      two\ndebug    root      three\nnative   tester    real\n\
                        harness  root      red\nlong     root      hours\n";

    fn names(long: bool, newest: bool) -> Vec<String> {
        expected(DOCUMENT, LIST, &rows(true), Whole { long, newest })
    }

    #[test]
    fn tests_and_rows_count_where_they_run() {
        assert_eq!(
            names(false, false),
            ["kexec", "mutant-leaks-a-page", "one", "three", "two"]
        );
        let long = [
            "hours",
            "kexec",
            "long-hugetlb-1g",
            "long-protection-keys",
            "mutant-leaks-a-page",
            "one",
            "self-kmemleak",
            "three",
            "two",
        ];
        assert_eq!(names(true, false), long);
    }

    #[test]
    fn newest_kernel_runs_the_machines_of_the_reference_kernel() {
        assert_eq!(names(false, true), ["kexec", "mutant-leaks-a-page", "one", "two"]);
        assert_eq!(
            names(true, true),
            ["hours", "kexec", "long-hugetlb-1g", "mutant-leaks-a-page", "one", "two"]
        );
    }

    #[test]
    fn what_never_ran_is_told_from_what_is_new() {
        let named = ["one", "two", "three", "four"].map(str::to_string);
        let (commit, long, missing) = parse("0123456789abcdef short\ntwo\nthree\ngone\n").unwrap();
        let ran = BTreeSet::from(["one", "three"].map(str::to_string));
        let compared = compare(&named, &missing, &ran);
        let expected = Compared {
            ran: 2,
            never: vec!["two".to_string()],
            new: vec!["four".to_string()],
        };
        assert_eq!(compared, expected);
        assert_eq!(
            compared.words(commit, long, Some(7)),
            "compared with the whole `make test` of 0123456789ab, 7 files changed since: 2 ran ok, 1 never; \
             1 are newer than it and did not run: four"
        );
        assert_eq!(parse("0123456789abcdef\n"), None);
    }
}

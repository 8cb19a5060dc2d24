// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which tests ran `ok`, kept in `target/test-results/` and compared with docs/tests.md.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;

use crate::paths;

fn directory() -> PathBuf {
    paths::target_dir().join("test-results")
}

/// Throws away what earlier runs left.
pub fn forget() -> Result<()> {
    match fs::remove_dir_all(directory()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("removing target/test-results")
        }
        _ => Ok(()),
    }
}

/// Writes what ran `ok` on the machine `row`, to `ROW.ok`, one name a line.
pub fn write<'a>(row: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let text: String = names.map(|name| format!("{name}\n")).collect();
    fs::create_dir_all(directory())?;
    let path = directory().join(format!("{row}.ok"));
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// The tests that docs/tests.md names, that a whole run goes through, and that are not in `ran`. Writes the file `whole`:
/// the commit, then those tests.
pub fn never_ok(ran: &BTreeSet<&str>, long: bool) -> Result<Vec<String>> {
    let document = fs::read_to_string(paths::root().join("docs/tests.md")).context("reading docs/tests.md")?;
    let program = paths::target_dir().join("release/dune-tests");
    let list = Command::new(&program).arg("list").output();
    let list = list.with_context(|| format!("running {}", program.display()))?;
    let missing = missing(&document, &String::from_utf8_lossy(&list.stdout), ran, long);
    let head = Command::new("git")
        .args(["rev-parse", "HEAD"])
        .current_dir(paths::root())
        .output();
    // Without git there is nothing to compare a later state with.
    if let Some(head) = head.ok().filter(|head| head.status.success()) {
        let mut text = String::from_utf8_lossy(&head.stdout).into_owned();
        text.extend(missing.iter().map(|name| format!("{name}\n")));
        fs::create_dir_all(directory())?;
        fs::write(directory().join("whole"), text).context("writing target/test-results/whole")?;
    }
    Ok(missing)
}

/// The same from the texts: the document, and what `dune-tests list` says.
fn missing(document: &str, list: &str, ran: &BTreeSet<&str>, long: bool) -> Vec<String> {
    let suites: BTreeMap<&str, &str> = list
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let suite = words.next()?;
            Some((words.nth(1)?, suite))
        })
        .collect();
    let mut names: Vec<&str> = document
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|name| match suites.get(name) {
            // Other kinds of test, which other parts of a run count.
            None => false,
            Some(&"native" | &"harness") => false,
            Some(suite) => long || !suite.contains("long"),
        })
        .filter(|name| !ran.contains(name))
        .collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::missing;

    const DOCUMENT: &str =
        "`not_in_a_table`\n| Clause | Tests |\n|---|---|\n| a | `one`, `two` |\n| b | `two`, `three` |\n\
                            | c | no test yet |\n| d | `a_host_test`, `real`, `red`, `hours` |\n";
    const LIST: &str =
        "short    tester    one\nshort    root      two\ndebug    root      three\nnative   tester    real\n\
                        harness  root      red\nlong     root      hours\n";

    #[test]
    fn what_did_not_run_is_named_once() {
        let ran = BTreeSet::from(["one"]);
        assert_eq!(missing(DOCUMENT, LIST, &ran, false), ["three", "two"]);
        let ran = BTreeSet::from(["one", "two", "three"]);
        assert!(missing(DOCUMENT, LIST, &ran, false).is_empty());
    }

    #[test]
    fn long_tests_count_in_long_runs() {
        let ran = BTreeSet::from(["one", "two", "three"]);
        assert_eq!(missing(DOCUMENT, LIST, &ran, true), ["hours"]);
    }
}

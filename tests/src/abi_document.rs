// SPDX-License-Identifier: MIT OR Apache-2.0

//! What docs/abi.md says that each call may answer, read from its table "Calls".
//!
//! The first column holds the calls of a row in backticks, the third its errnos, the last the test that shows them, or
//! "no test: " and why there is none. An empty first column means the calls of the row above.

/// The document.
const TEXT: &str = include_str!("../../docs/abi.md");

/// Names that the table may use.
const ERRNOS: &[(&str, i32)] = &[
    ("EPERM", libc::EPERM),
    ("ENOENT", libc::ENOENT),
    ("EINTR", libc::EINTR),
    ("EIO", libc::EIO),
    ("ENXIO", libc::ENXIO),
    ("EBADF", libc::EBADF),
    ("EAGAIN", libc::EAGAIN),
    ("ENOMEM", libc::ENOMEM),
    ("EACCES", libc::EACCES),
    ("EFAULT", libc::EFAULT),
    ("EBUSY", libc::EBUSY),
    ("EEXIST", libc::EEXIST),
    ("EXDEV", libc::EXDEV),
    ("ENODEV", libc::ENODEV),
    ("EINVAL", libc::EINVAL),
    ("EMFILE", libc::EMFILE),
    ("ENOTTY", libc::ENOTTY),
    ("ENOSPC", libc::ENOSPC),
    ("EOVERFLOW", libc::EOVERFLOW),
];

/// An errno that a call may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub call: &'static str,
    pub name: &'static str,
    pub errno: i32,
    /// Who shows it; `None`: nobody can, and the table says why.
    pub test: Option<&'static str>,
}

/// The calls of the table, in its order.
pub fn calls() -> Vec<&'static str> {
    let mut calls = Vec::new();
    for call in rows(TEXT).into_iter().flat_map(|row| row.calls) {
        if !calls.contains(&call) {
            calls.push(call);
        }
    }
    calls
}

/// All that the table says.
///
/// # Panics
///
/// Where the table is not as the module's documentation says.
pub fn answers() -> Vec<Answer> {
    rows(TEXT).into_iter().flat_map(Row::answers).collect()
}

/// A row of the table.
struct Row {
    calls: Vec<&'static str>,
    errnos: Vec<&'static str>,
    test: &'static str,
}

fn rows(text: &'static str) -> Vec<Row> {
    let section = text
        .lines()
        .skip_while(|line| *line != "## Calls")
        .skip(1)
        .take_while(|line| !line.starts_with("## "));
    let lines = section.filter(|line| line.starts_with('|'));
    let mut rows: Vec<Row> = Vec::new();
    // The heading, and the line below it.
    for line in lines.skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [calls, _, errnos, _, _, test] = cells[..] else {
            panic!("not six columns: {line}");
        };
        let mut named = in_backticks(calls);
        if named.is_empty() {
            named.clone_from(&rows.last().expect("the first row names a call").calls);
        }
        let errnos = errnos.split(", ").filter(|name| !name.is_empty()).collect();
        rows.push(Row {
            calls: named,
            errnos,
            test,
        });
    }
    rows
}

fn in_backticks(text: &'static str) -> Vec<&'static str> {
    text.split('`').skip(1).step_by(2).collect()
}

impl Row {
    fn answers(self) -> Vec<Answer> {
        let Self { calls, errnos, test } = self;
        let shown_by = match in_backticks(test)[..] {
            _ if errnos.is_empty() => None,
            [name] => Some(name),
            _ if test.starts_with("no test: ") => None,
            _ => panic!("{calls:?} {errnos:?}: neither a test nor why there is none: {test:?}"),
        };
        let pairs = calls
            .iter()
            .flat_map(|call| errnos.iter().map(move |name| (*call, *name)));
        pairs
            .map(|(call, name)| {
                let known = ERRNOS.iter().find(|(known, _)| *known == name);
                let (_, errno) = known.unwrap_or_else(|| panic!("{call}: {name} is no errno that this test knows"));
                Answer {
                    call,
                    name,
                    errno: *errno,
                    test: shown_by,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::answers;
    use super::calls;

    #[test]
    fn tests_that_the_document_names_are_there() {
        let known: BTreeSet<_> = crate::all_tests().into_iter().map(|test| test.name).collect();
        for answer in answers() {
            if let Some(test) = answer.test {
                assert!(known.contains(test), "there is no {test}: {answer:?}");
            }
        }
    }

    #[test]
    fn every_errno_stands_once() {
        let mut seen = BTreeSet::new();
        for answer in answers() {
            assert!(seen.insert((answer.call, answer.errno)), "twice: {answer:?}");
        }
        assert!(seen.len() > 50, "{}", seen.len());
    }

    #[test]
    fn every_call_of_the_abi_is_there() {
        let source = include_str!("../../abi/src/abi.rs");
        let of_abi: BTreeSet<_> = source
            .lines()
            .filter_map(|line| line.strip_prefix("pub const ")?.split_once(": u32 = ioc("))
            .map(|(name, _)| name)
            .collect();
        let of_document: BTreeSet<_> = calls().into_iter().filter(|call| call.starts_with("DUNE_")).collect();
        assert_eq!(of_document, of_abi);
    }
}

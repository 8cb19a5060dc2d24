// SPDX-License-Identifier: MIT OR Apache-2.0

//! Collects the examples of libdune's documentation, so that a test can run them where Dune is: rustdoc, on the host, can
//! only compile them.

use std::env;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

/// One example.
struct Example {
    /// File and line.
    place: String,
    code: String,
}

fn main() -> io::Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../libdune/src");
    println!("cargo:rerun-if-changed={}", source.display());
    let mut files = Vec::new();
    collect_files(&source, &mut files)?;
    files.sort();
    let mut examples = Vec::new();
    for file in &files {
        let name = file.strip_prefix(&source).unwrap_or(file).display().to_string();
        collect_examples(&name, &fs::read_to_string(file)?, &mut examples);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("documentation.rs"), program(&examples))
}

fn collect_files(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The text of a line of a doc comment.
fn doc_text(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let text = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"))?;
    Some(text.strip_prefix(' ').unwrap_or(text))
}

/// Whether a fence with these words is Rust that runs; `None` where it says that it must not be tried.
fn runs(words: &str) -> Option<bool> {
    let mut is_rust = true;
    for word in words.split([',', ' ']).filter(|word| !word.is_empty()) {
        match word {
            "ignore" => return None,
            "rust" | "no_run" => {}
            _ => is_rust = false,
        }
    }
    Some(is_rust)
}

fn collect_examples(name: &str, source: &str, examples: &mut Vec<Example>) {
    // The fence that the line is in.
    let mut fence: Option<(bool, Example)> = None;
    for (number, line) in source.lines().enumerate() {
        let place = format!("{name}:{}", number + 1);
        let Some(text) = doc_text(line) else {
            assert!(fence.is_none(), "{place}: a fence that does not end");
            continue;
        };
        match (&mut fence, text.trim_start().strip_prefix("```")) {
            (None, Some(words)) => {
                let is_run = runs(words).unwrap_or_else(|| panic!("{place}: an example that nobody tries"));
                let code = String::new();
                fence = Some((is_run, Example { place, code }));
            }
            (Some(_), Some(_)) => {
                let ended = fence.take();
                examples.extend(ended.and_then(|(is_run, example)| is_run.then_some(example)));
            }
            (Some((_, example)), None) => {
                // What rustdoc does not show is code too.
                let shown = text.strip_prefix("# ").unwrap_or(if text == "#" { "" } else { text });
                example.code.push_str(shown);
                example.code.push('\n');
            }
            (None, None) => {}
        }
    }
}

/// A function for each, as rustdoc makes a program of each, and their table.
fn program(examples: &[Example]) -> String {
    let mut text = String::new();
    for (number, Example { code, .. }) in examples.iter().enumerate() {
        let body = if code.contains("fn main(") {
            format!("{code}\nsuper::ended(main());")
        } else if code.trim_end().ends_with("(())") {
            format!("fn inner() -> Result<(), impl core::fmt::Debug> {{\n{code}\n}}\nsuper::ended(inner());")
        } else {
            code.clone()
        };
        writeln!(text, "fn example_{number}() {{\n{body}\n}}").expect("a string");
    }
    writeln!(text, "pub const EXAMPLES: &[(&str, fn())] = &[").expect("a string");
    for (number, Example { place, .. }) in examples.iter().enumerate() {
        writeln!(text, "({place:?}, example_{number}),").expect("a string");
    }
    text.push_str("];\n");
    text
}

// SPDX-License-Identifier: MIT OR Apache-2.0

//! Real work in Dune mode: reads a text, keeps every occurrence of every word, prints the most frequent ones.
//!
//! Standard output is the same in and out of Dune mode; what differs (time, memory) goes to standard error.

use std::collections::HashMap;
use std::fs::File;
use std::hash::Hasher;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::BufWriter;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use clap::Parser;
use dune_examples::cpl;
use dune_examples::die;
use dune_examples::exit_lines;
use dune_examples::ticks;
use dune_examples::unit;
use libdune::Dune;

/// Counts the words of a text, keeping where each of them stands and the line around it.
#[derive(Parser)]
struct Options {
    /// The text.
    file: PathBuf,
    /// Work outside Dune mode.
    #[arg(long)]
    native: bool,
    /// Write a text of so many KB to the file first; the same one each time.
    #[arg(long, value_name = "KB")]
    generate: Option<u64>,
    /// How many words to print.
    #[arg(long, default_value_t = 10)]
    top: usize,
}

/// One occurrence of a word.
struct Occurrence {
    line: u32,
    column: u32,
    /// The text up to the end of its line, as a concordance shows it.
    context: String,
}

type Words = HashMap<String, Vec<Occurrence>>;

/// A small generator of numbers, the same each time (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Writes lines of made-up words, frequent ones short.
fn generate(path: &Path, kilobytes: u64) -> io::Result<()> {
    const SYLLABLES: [&str; 16] = [
        "ka", "to", "mi", "re", "so", "na", "lu", "Ve", "di", "po", "sha", "Gor", "ti", "mu", "bel", "xo",
    ];
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut numbers = Numbers(0x00d0_0e15);
    let mut left = kilobytes << 10;
    while left > 0 {
        let mut line = String::new();
        for _ in 0..12 {
            // Small numbers come up often: the shift is random too.
            let random = numbers.next();
            let mut word = ((random >> 32) % 1_000_000) >> (random & 15);
            loop {
                line.push_str(SYLLABLES[(word % 16) as usize]);
                word /= 16;
                if word == 0 {
                    break;
                }
            }
            line.push(' ');
        }
        line.push('\n');
        left = left.saturating_sub(line.len() as u64);
        file.write_all(line.as_bytes())?;
    }
    file.flush()
}

/// Bytes of text that are kept with every occurrence: 384 KB of text take 160 MB of heap.
const CONTEXT_BYTES: usize = 3200;

fn count(path: &Path) -> io::Result<Words> {
    let mut words = Words::new();
    let mut reader = BufReader::with_capacity(1 << 16, File::open(path)?);
    let (mut line, mut text, mut key) = (String::new(), String::new(), String::new());
    let mut number = 0;
    while reader.read_line(&mut line)? != 0 {
        number += 1;
        text.push_str(&line);
        let mut surplus = text.len().saturating_sub(CONTEXT_BYTES);
        while !text.is_char_boundary(surplus) {
            surplus += 1;
        }
        text.drain(..surplus);
        for word in line.split_ascii_whitespace() {
            let column = word.as_ptr() as usize - line.as_ptr() as usize;
            let occurrence = Occurrence {
                line: number,
                column: column as u32,
                context: text.clone(),
            };
            key.clear();
            key.push_str(word);
            key.make_ascii_lowercase();
            match words.get_mut(&key) {
                Some(at) => at.push(occurrence),
                None => {
                    words.insert(key.clone(), vec![occurrence]);
                }
            }
        }
        line.clear();
    }
    Ok(words)
}

fn print(words: &Words, top: usize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut order: Vec<_> = words.iter().collect();
    order.sort_by(|(a, a_at), (b, b_at)| b_at.len().cmp(&a_at.len()).then(a.cmp(b)));
    let occurrences: usize = order.iter().map(|(_, at)| at.len()).sum();
    // SipHash with its fixed keys: the same number for the same occurrences in the same order.
    #[allow(deprecated)]
    let mut hash = std::hash::SipHasher::new();
    for (word, at) in &order {
        hash.write(word.as_bytes());
        for occurrence in *at {
            hash.write_u32(occurrence.line);
            hash.write_u32(occurrence.column);
            hash.write_usize(occurrence.context.len());
        }
    }
    writeln!(
        out,
        "{occurrences} words, {} different, hash {:016x}",
        order.len(),
        hash.finish()
    )?;
    for (word, at) in order.iter().take(top) {
        let (Some(first), Some(last)) = (at.first(), at.last()) else {
            continue;
        };
        writeln!(
            out,
            "{:>8}  {word}  first {}:{}  last {}:{} {}",
            at.len(),
            first.line,
            first.column,
            last.line,
            last.column,
            last.context.lines().last().unwrap_or_default()
        )?;
    }
    out.flush()
}

/// A line of /proc/self/status.
fn status(key: &str) -> String {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.map_or_else(|| "unknown".to_owned(), |value| value.trim().to_owned())
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    if let Some(kilobytes) = options.generate {
        generate(&options.file, kilobytes)?;
    }
    let unit = unit();
    let dune = (!options.native).then(|| Dune::enter().unwrap_or_else(|error| die(&error)));
    let start = ticks();
    let words = count(&options.file)?;
    print(&words, options.top)?;
    let taken = ticks() - start;
    eprintln!("at CPL {}: {taken} {unit}, most memory {}", cpl(), status("VmHWM"));
    if let Some(dune) = dune {
        let counters = dune.counters();
        dune.leave();
        eprintln!("VM exits:");
        for line in exit_lines(&counters) {
            eprintln!("{line}");
        }
    }
    Ok(())
}

// SPDX-License-Identifier: MIT OR Apache-2.0

//! A small web server that answers each request in a compartment: a stack and a page table of its own, in which the
//! server's key and other requests are not mapped. Beside it the same server with a process per request.
//!
//! The handler (`http.rs`) has bugs that let a request read and write wherever it likes. In a compartment that is a page
//! fault, which is an error value for the server: it answers 500 and goes on. A forked child cannot harm the server
//! either, but has a copy of all its secrets, and hands them out.

mod client;
mod http;
mod making;
mod server;
mod ways;

use std::process::ExitCode;

use clap::Parser;
use dune_examples::median;
use dune_examples::print_row;
use dune_examples::unit;
use libdune::compartment::Pages;
use libdune::Dune;

use crate::client::Got;
use crate::http::letter;
use crate::http::DOCUMENTS;
use crate::http::DOCUMENT_BYTES;
use crate::making::Made;
use crate::server::at;
use crate::server::ServerError;
use crate::server::Way;

/// Serves requests in compartments, and by fork.
#[derive(Parser)]
struct Options {
    /// Good requests for each way to answer.
    #[arg(long, default_value_t = 40)]
    requests: usize,
    /// Rows for `make bench-lib` as well.
    #[arg(long)]
    rows: bool,
    /// Ask this port of 127.0.0.1 for the paths, instead of serving.
    #[arg(long, hide = true)]
    client: Option<u16>,
    #[arg(hide = true)]
    paths: Vec<String>,
}

/// The server's key. A client has no business with it.
const KEY: [u8; 16] = *b"the server's key";
/// What another customer asks at the same time.
const OTHER: [u8; 16] = *b"my PIN is 482913";

/// What requests must not get at, somewhere in the server's memory.
struct Secrets {
    key: Box<[u8; 16]>,
    other: Pages,
}

impl Secrets {
    fn new() -> Result<Self, ServerError> {
        let mut other = Pages::new(OTHER.len()).map_err(at("mmap"))?;
        other[..OTHER.len()].copy_from_slice(&OTHER);
        Ok(Self {
            key: Box::new(KEY),
            other,
        })
    }

    fn are_whole(&self) -> bool {
        // SAFETY: Our own, read again: who says that nobody wrote to it.
        let key = unsafe { (&raw const *self.key).read_volatile() };
        key == KEY && self.other.starts_with(&OTHER)
    }

    /// Each attempt: what it is, and how to ask for it.
    fn attempts(&self) -> [(&'static str, String); 6] {
        let key = &raw const *self.key as usize;
        [
            ("read the server's key", format!("/read/{key:x}")),
            (
                "read another request",
                format!("/read/{:x}", self.other.as_ptr() as usize),
            ),
            ("write the server's key", format!("/write/{key:x}")),
            ("use up the stack", "/recurse".into()),
            ("divide by zero", "/divide".into()),
            ("open a file", "/open".into()),
        ]
    }

    /// Whether an answer holds something that it must not.
    fn leaked(&self, got: &Got) -> bool {
        [KEY, OTHER]
            .iter()
            .any(|secret| got.body.windows(secret.len()).any(|part| part == secret))
    }
}

/// What one way came to.
struct Outcome {
    name: &'static str,
    /// Ticks of the server between request and end, and of the client.
    server: Vec<u64>,
    client: Vec<u64>,
    attempts: Vec<Got>,
}

/// Serves good requests, then each attempt, then one more good request.
fn measure(
    name: &'static str,
    options: &Options,
    secrets: &Secrets,
    way: &mut dyn Way,
) -> Result<Outcome, ServerError> {
    let (listener, port) = server::listen()?;
    let attempts = secrets.attempts();
    let good = options.requests;
    let mut paths: Vec<String> = (0..good).map(client::good).collect();
    paths.extend(attempts.iter().map(|(_, path)| path.clone()));
    paths.push(client::good(good));
    let client = client::start(port, &paths)?;
    let served = server::serve(&listener, paths.len(), way);
    let got = client::finish(client);
    let (mut server, mut got) = (served?, got?);
    if got.len() != paths.len() {
        return Err(ServerError::Client(format!(
            "{} answers, not {}",
            got.len(),
            paths.len()
        )));
    }
    let last = got.pop();
    let attempts = got.split_off(good);
    server.truncate(good);
    for (number, answer) in got.iter().chain(last.as_ref()).enumerate() {
        if answer.status != 200 || !client::is_good(number, &answer.body) {
            return Err(ServerError::Client(format!(
                "{name}: {} is {answer:?}",
                client::good(number)
            )));
        }
    }
    Ok(Outcome {
        name,
        server,
        client: got.iter().map(|answer| answer.ticks).collect(),
        attempts,
    })
}

fn site() -> Result<Pages, ServerError> {
    let mut site = Pages::new(DOCUMENTS * DOCUMENT_BYTES).map_err(at("mmap"))?;
    for (number, document) in site.chunks_exact_mut(DOCUMENT_BYTES).enumerate().take(DOCUMENTS) {
        for (index, byte) in document.iter_mut().enumerate() {
            *byte = letter(number, index);
        }
    }
    Ok(site)
}

/// All ways, the ordinary one first, while the process still is one; and what making took.
fn all(options: &Options, secrets: &Secrets) -> Result<(Vec<Outcome>, Vec<Made>), Box<dyn std::error::Error>> {
    let mut made = vec![making::processes(options.requests)?];
    let site = site()?;
    let mut results = vec![measure(
        "process (fork)",
        options,
        secrets,
        &mut ways::Fork { site: &site },
    )?];
    let dune = Dune::builder().children(false).enter()?;
    let thread = dune.thread();
    ways::refuse_system_calls(&thread);
    let template = ways::template(&thread, &site)?;
    results.push(measure(
        "compartment",
        options,
        secrets,
        &mut ways::Fresh {
            thread: &thread,
            template: &template,
            site: &site,
        },
    )?);
    let mut again = ways::Again::new(&thread, &template, &site)?;
    results.push(measure("compartment, used again", options, secrets, &mut again)?);
    drop(again);
    results.push(measure(
        "compartment in a new thread",
        options,
        secrets,
        &mut ways::Threads {
            template: &template,
            site: &site,
        },
    )?);
    made.extend(making::compartments(&thread, &template, options.requests)?);
    drop(template);
    dune.leave();
    made.push(making::threads(options.requests)?);
    Ok((results, made))
}

/// What an attempt got, in a word, and whether it is as it should be: compartments give nothing away.
fn judge(secrets: &Secrets, got: &Got, is_compartment: bool) -> (String, bool) {
    let text = match got.status {
        _ if secrets.leaked(got) => "got it".to_string(),
        200 => "done".to_string(),
        status => format!("{status}"),
    };
    (
        text,
        !is_compartment || matches!(got.status, 403 | 500) && !secrets.leaked(got),
    )
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(port) = options.client {
        return match client::ask(port, &options.paths) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("sthread: client: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let run = || -> Result<bool, Box<dyn std::error::Error>> {
        let secrets = Secrets::new()?;
        let (mut results, mut made) = all(&options, &secrets)?;
        let mut all_well = secrets.are_whole();

        println!("{:<24} what a hostile request got, by what answers it", "attempt");
        let names: Vec<String> = results.iter().map(|result| format!("{:<28}", result.name)).collect();
        println!("{:<24} {}", "", names.concat().trim_end());
        for (index, (attempt, _)) in secrets.attempts().iter().enumerate() {
            let mut line = format!("{attempt:<24} ");
            for (number, result) in results.iter().enumerate() {
                let (text, is_well) = judge(&secrets, &result.attempts[index], number > 0);
                all_well &= is_well;
                let mark = if is_well { "" } else { " <-- NOT STOPPED" };
                line.push_str(&format!("{:<28}", format!("{text}{mark}")));
            }
            println!("{}", line.trim_end());
        }
        println!();
        println!(
            "{} requests for {DOCUMENT_BYTES} bytes each, in {}:",
            options.requests,
            unit()
        );
        println!(
            "{:<28} {:>26} {:>28}",
            "", "make, answer, give back", "whole request of the client"
        );
        println!(
            "{:<28} {:>13} {:>12} {:>15} {:>12}",
            "", "median", "max", "median", "max"
        );
        if options.rows {
            for result in &results {
                print_row("sthread", result.name, &result.server);
                print_row("sthread_request", result.name, &result.client);
            }
            for made in &made {
                print_row("sthread_make", made.name, &made.ticks);
            }
        }
        for result in &mut results {
            let most = |times: &[u64]| times.iter().copied().max().unwrap_or(0);
            let (server_max, client_max) = (most(&result.server), most(&result.client));
            println!(
                "{:<28} {:>13} {server_max:>12} {:>15} {client_max:>12}",
                result.name,
                median(&mut result.server),
                median(&mut result.client),
            );
        }
        println!("\nmake one that answers at once, and wait for its end:");
        for made in &mut made {
            let max = made.ticks.iter().copied().max().unwrap_or(0);
            println!("{:<28} {:>13} {max:>12}", made.name, median(&mut made.ticks));
        }
        Ok(all_well)
    };
    match run() {
        Ok(true) => {
            println!("\nthe server goes on, its secrets are whole");
            ExitCode::SUCCESS
        }
        Ok(false) => {
            eprintln!("sthread: not what was expected");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("sthread: {error}");
            ExitCode::FAILURE
        }
    }
}

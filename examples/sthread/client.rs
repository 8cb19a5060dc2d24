// SPDX-License-Identifier: MIT OR Apache-2.0

//! The other side: a process of its own that asks, looks at the answers, and says what it got on standard output.

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;

use dune_examples::ticks;

use crate::http::letter;
use crate::http::DOCUMENTS;
use crate::http::DOCUMENT_BYTES;
use crate::server::at;
use crate::server::ServerError;

/// What became of a request, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    pub status: u16,
    /// From the connection to its end, in ticks.
    pub ticks: u64,
    pub body: Vec<u8>,
}

/// The path of the good request with this number.
pub fn good(number: usize) -> String {
    format!("/document/{}", number % DOCUMENTS)
}

/// Whether a body is that of [`good`].
pub fn is_good(number: usize, body: &[u8]) -> bool {
    let letters = (0..DOCUMENT_BYTES).map(|index| letter(number % DOCUMENTS, index));
    body.iter().copied().eq(letters)
}

/// Asks for each path, one after the other, and prints a line for each. What a started copy of this program does.
pub fn ask(port: u16, paths: &[String]) -> io::Result<()> {
    let mut all = Vec::with_capacity(2 * DOCUMENT_BYTES);
    let mut lines = String::new();
    for path in paths {
        all.clear();
        let start = ticks();
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        stream.read_to_end(&mut all)?;
        let ticks = ticks() - start;
        drop(stream);
        let (status, body) = parse(&all).unwrap_or((0, &[]));
        lines.push_str(&format!("{status} {ticks} "));
        body.iter().for_each(|byte| lines.push_str(&format!("{byte:02x}")));
        lines.push('\n');
    }
    io::stdout().write_all(lines.as_bytes())
}

/// Status and body of an answer.
fn parse(answer: &[u8]) -> Option<(u16, &[u8])> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let body = &answer[end + 4..];
    let status = head.strip_prefix("HTTP/1.0 ")?.split(' ').next()?.parse().ok()?;
    let length: usize = head.rsplit_once("Content-Length: ")?.1.parse().ok()?;
    (body.len() == length).then_some((status, body))
}

/// Starts this program as a client.
pub fn start(port: u16, paths: &[String]) -> Result<Child, ServerError> {
    Command::new("/proc/self/exe")
        .arg("--client")
        .arg(port.to_string())
        .args(paths)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(at("starting the client"))
}

/// Waits for a client and reads what it got.
pub fn finish(client: Child) -> Result<Vec<Got>, ServerError> {
    let output = client.wait_with_output().map_err(at("waiting for the client"))?;
    if !output.status.success() {
        return Err(ServerError::Client(output.status.to_string()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let got = text.lines().map(read_line).collect::<Option<Vec<_>>>();
    got.ok_or_else(|| ServerError::Client(format!("it said {text:?}")))
}

fn read_line(line: &str) -> Option<Got> {
    let mut words = line.split(' ');
    let (status, ticks) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let digits = words.next()?.as_bytes();
    let body = digits
        .chunks(2)
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
    Some(Got {
        status,
        ticks,
        body: body.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        assert_eq!(
            parse(b"HTTP/1.0 404 Not Found\r\nContent-Length: 2\r\n\r\nno"),
            Some((404, &b"no"[..]))
        );
        assert_eq!(parse(b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nno"), None);
        assert_eq!(parse(b"HTTP/1.0 200 OK"), None);
        let got = read_line("200 17 0aff").unwrap();
        assert_eq!((got.status, got.ticks, got.body), (200, 17, vec![10, 255]));
        assert!(read_line("500 1 ").unwrap().body.is_empty());
        assert!(read_line("x").is_none());
    }

    #[test]
    fn good_bodies_are_told_from_others() {
        let mut body: Vec<u8> = (0..DOCUMENT_BYTES).map(|index| letter(2, index)).collect();
        assert!(is_good(2, &body) && is_good(2 + DOCUMENTS, &body) && !is_good(3, &body));
        body[100] ^= 1;
        assert!(!is_good(2, &body));
    }
}

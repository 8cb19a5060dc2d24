// SPDX-License-Identifier: MIT OR Apache-2.0

//! The part of the server that is the same for all ways to answer: connections, requests, times.

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use dune_examples::ticks;
use libdune::compartment::CompartmentError;
use libdune::compartment::Ended;
use libdune::PagingError;

use crate::http;
use crate::http::REQUEST_BYTES;

/// How long a client may say nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why the server cannot go on. What is wrong with a request is an answer instead.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{step}: {error}")]
    Io { step: &'static str, error: io::Error },
    #[error("no client came within {} s", PATIENCE.as_secs())]
    NoClient,
    #[error(transparent)]
    Compartment(#[from] CompartmentError),
    #[error(transparent)]
    Paging(#[from] PagingError),
    #[error("the handler: {0}")]
    Ended(#[from] Ended),
    #[error("a thread of the server panicked")]
    Thread,
    #[error("a {name} answered {answer}")]
    Made { name: &'static str, answer: i32 },
    #[error("the client failed: {0}")]
    Client(String),
}

/// Names the step that an error of Linux' belongs to.
pub fn at(step: &'static str) -> impl FnOnce(io::Error) -> ServerError {
    move |error| ServerError::Io { step, error }
}

/// A way to answer a request apart from all else.
pub trait Way {
    /// Answers on the stream: by what the handler made of the request, or by 500 where that went wrong.
    fn answer(&mut self, request: &[u8], stream: &mut TcpStream) -> Result<(), ServerError>;
}

/// A listener, and its port.
pub fn listen() -> Result<(TcpListener, u16), ServerError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(at("bind"))?;
    let port = listener.local_addr().map_err(at("getsockname"))?.port();
    Ok((listener, port))
}

/// Serves so many connections; returns what each took between the request and the end of all that was made for it, in ticks.
pub fn serve(listener: &TcpListener, connections: usize, way: &mut dyn Way) -> Result<Vec<u64>, ServerError> {
    let mut buffer = vec![0; REQUEST_BYTES];
    let mut times = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = accept(listener)?;
        let bytes = read_request(&mut stream, &mut buffer).map_err(at("reading a request"))?;
        let start = ticks();
        way.answer(&buffer[..bytes], &mut stream)?;
        times.push(ticks() - start);
    }
    Ok(times)
}

/// The next connection, unless none comes any more.
fn accept(listener: &TcpListener) -> Result<TcpStream, ServerError> {
    let mut waited = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: One structure, as is said.
    match unsafe { libc::poll(&raw mut waited, 1, PATIENCE.as_millis() as i32) } {
        0 => return Err(ServerError::NoClient),
        n if n < 0 => return Err(at("poll")(io::Error::last_os_error())),
        _ => {}
    }
    let (stream, _) = listener.accept().map_err(at("accept"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(at("setsockopt"))?;
    Ok(stream)
}

/// Reads up to the empty line, or as much as there is room for.
fn read_request(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut used = 0;
    while used < buffer.len() && !buffer[..used].ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer[used..])? {
            0 => break,
            bytes => used += bytes,
        }
    }
    Ok(used)
}

/// Says that something went wrong with the request.
pub fn refuse(stream: &mut TcpStream) -> Result<(), ServerError> {
    let mut buffer = [0; 128];
    let answer = http::answer(&mut buffer, 500, b"that went wrong\n");
    stream.write_all(&buffer[..answer.bytes]).map_err(at("answering"))
}

// SPDX-License-Identifier: MIT OR Apache-2.0

//! What becomes of a request, with the mistakes that the server is about. It allocates nothing: it runs in compartments.

use core::arch::asm;
use core::fmt;
use core::fmt::Write;

/// Most bytes of a request, and of an answer.
pub const REQUEST_BYTES: usize = 1024;
pub const ANSWER_BYTES: usize = 4096;

/// Bytes of one document; the site has one for each number.
pub const DOCUMENT_BYTES: usize = 1024;
pub const DOCUMENTS: usize = 16;

/// What an answer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Bytes of the buffer that it takes, head and all.
    pub bytes: usize,
}

/// A letter of a document: the same everywhere, so that a client can tell whether it got the right one.
pub fn letter(document: usize, index: usize) -> u8 {
    b'a' + ((document * 7 + index * 11 + index / 26) % 26) as u8
}

/// Text into a buffer; what does not fit is left out.
struct Text<'b> {
    buffer: &'b mut [u8],
    used: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.add(text.as_bytes());
        Ok(())
    }
}

impl Text<'_> {
    fn add(&mut self, bytes: &[u8]) {
        for (to, from) in self.buffer[self.used..].iter_mut().zip(bytes) {
            *to = *from;
            self.used += 1;
        }
    }
}

/// Writes head and body.
pub fn answer(buffer: &mut [u8], status: u16, body: &[u8]) -> Answer {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        _ => "Internal Server Error",
    };
    let mut text = Text { buffer, used: 0 };
    let length = body.len();
    let _ = write!(text, "HTTP/1.0 {status} {reason}\r\nContent-Length: {length}\r\n\r\n");
    text.add(body);
    Answer {
        status,
        bytes: text.used,
    }
}

/// The path of a GET.
fn path(request: &[u8]) -> Option<&str> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let line = core::str::from_utf8(line).ok()?;
    line.strip_prefix("GET ")?.split(' ').next()
}

/// Answers one request. The paths behind the first two are stand-ins for bugs: what they do, a request should never
/// be able to have done.
pub fn serve(request: &[u8], site: &[u8], buffer: &mut [u8]) -> Answer {
    let Some(path) = path(request) else {
        return answer(buffer, 400, b"what?\n");
    };
    let mut words = path.split('/').skip(1);
    let word = words.next().unwrap_or("");
    let address = || usize::from_str_radix(path.rsplit('/').next()?, 16).ok();
    match (word, words.next()) {
        ("", _) => answer(buffer, 200, b"hello\n"),
        ("document", Some(number)) => {
            let document = number.parse().ok().filter(|number| *number < DOCUMENTS);
            match document.and_then(|number| site.chunks_exact(DOCUMENT_BYTES).nth(number)) {
                Some(document) => answer(buffer, 200, document),
                None => answer(buffer, 404, b"no such document\n"),
            }
        }
        ("read", Some(_)) => match address() {
            // SAFETY: There is none: the client says where. The server is to hold all the same.
            Some(address) => answer(buffer, 200, &unsafe { (address as *const [u8; 16]).read_volatile() }),
            None => answer(buffer, 400, b"where?\n"),
        },
        ("write", Some(_)) => match address() {
            Some(address) => {
                // SAFETY: As above.
                unsafe { (address as *mut u64).write_volatile(0) };
                answer(buffer, 200, b"written\n")
            }
            None => answer(buffer, 400, b"where?\n"),
        },
        ("recurse", _) => {
            let sum = recurse(1 << 20);
            answer(buffer, if sum == 0 { 404 } else { 200 }, b"came back\n")
        }
        ("divide", _) => {
            let quotient = 84 / hidden_zero();
            answer(buffer, 200, &[quotient])
        }
        ("open", _) => match open(c"/etc/passwd") {
            Ok(_) => answer(buffer, 200, b"opened\n"),
            Err(_) => answer(buffer, 403, b"refused\n"),
        },
        _ => answer(buffer, 404, b"no such path\n"),
    }
}

/// Never comes back on any stack.
#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let mut part = [depth; 64];
    core::hint::black_box(&mut part);
    if depth == 0 {
        return 0;
    }
    recurse(depth - 1) + core::hint::black_box(&part)[63]
}

/// Divides as C does: Rust would look first, and panic.
fn hidden_zero() -> u8 {
    // SAFETY: A divide error is what is wanted.
    unsafe { asm!("div {0:l}", in(reg) 0u32, inout("eax") 84 => _, inout("edx") 0 => _, options(nostack)) };
    1
}

/// Without libc, which would touch errno.
fn open(path: &core::ffi::CStr) -> Result<i32, i32> {
    let result: i64;
    // SAFETY: A path, to be read only.
    unsafe {
        asm!(
            "syscall",
            inout("rax") libc::SYS_open => result,
            in("rdi") path.as_ptr(),
            in("rsi") libc::O_RDONLY | libc::O_CLOEXEC,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    i32::try_from(result).ok().filter(|fd| *fd >= 0).ok_or(-result as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(request: &str, site: &[u8]) -> (Answer, String) {
        let mut buffer = [0; ANSWER_BYTES];
        let answer = serve(request.as_bytes(), site, &mut buffer);
        (answer, String::from_utf8_lossy(&buffer[..answer.bytes]).into_owned())
    }

    #[test]
    fn requests_are_answered() {
        let site: Vec<u8> = (0..DOCUMENTS)
            .flat_map(|number| (0..DOCUMENT_BYTES).map(move |index| letter(number, index)))
            .collect();
        let (answer, all) = text("GET /document/3 HTTP/1.0\r\n\r\n", &site);
        assert_eq!(answer.status, 200);
        let (head, body) = all.split_once("\r\n\r\n").unwrap();
        assert_eq!(head, "HTTP/1.0 200 OK\r\nContent-Length: 1024");
        assert!(body.bytes().eq((0..DOCUMENT_BYTES).map(|index| letter(3, index))));
        for (request, status) in [
            ("GET / HTTP/1.0\r\n\r\n", 200),
            ("GET /document/16 HTTP/1.0\r\n\r\n", 404),
            ("GET /document/-1 HTTP/1.0\r\n\r\n", 404),
            ("GET /nothing HTTP/1.0\r\n\r\n", 404),
            ("GET /read/x HTTP/1.0\r\n\r\n", 400),
            ("POST / HTTP/1.0\r\n\r\n", 400),
            ("", 400),
        ] {
            assert_eq!(text(request, &site).0.status, status, "{request}");
        }
    }

    #[test]
    fn long_answers_are_cut() {
        let mut buffer = [0; 100];
        let answer = answer(&mut buffer, 200, &[b'x'; 1000]);
        assert_eq!((answer.status, answer.bytes), (200, 100));
    }
}

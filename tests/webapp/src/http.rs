//! As much of HTTP/1.1 as the app needs: GET and HEAD, keep-alive and close, no request bodies.

use std::fmt;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use crate::drain::Drain;

/// A request's head in bytes, at most.
const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// `/big` answers with so many bytes, at most.
const BIG_BYTES_MAX: u64 = 1 << 30;
const BIG_CHUNK_BYTES: usize = 16 * 1024;
/// How often a waiting thread looks whether the server is ending: the socket's read time-out.
pub(crate) const POLL_TIME: Duration = Duration::from_millis(250);
/// For one write to make progress, at most.
pub(crate) const WRITE_TIME_MAX: Duration = Duration::from_secs(10);
/// Without a request, a connection is kept for so long.
const IDLE_TIME_MAX: Duration = Duration::from_secs(60);
/// A request that has begun must be whole after this.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// While the server is ending, a connection may still begin a request for so long.
const LAST_CALL_TIME: Duration = Duration::from_secs(1);

/// What the app says about itself.
pub(crate) struct Identity {
    pub(crate) release: String,
    pub(crate) instance: String,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    Hello,
    Health,
    Big(u64),
    Crash,
    /// A file of the guest's, with its mode and owner in a header line.
    Secret(String),
    Missing,
}

#[derive(Debug, PartialEq, Eq)]
struct HttpRequest {
    method: String,
    target: String,
    is_head: bool,
    keep_alive: bool,
    /// A status to answer with instead of routing.
    refusal: Option<u16>,
}

/// Answers requests until the peer is done, breaks a rule, or the server ends.
pub(crate) fn serve_connection<S: Read + Write>(
    stream: &mut S,
    identity: &Identity,
    drain: &Drain,
) -> io::Result<()> {
    let mut received = Vec::with_capacity(1024);
    while let Some(request) = next_request(stream, &mut received, drain)? {
        let keep_alive = request.keep_alive && request.refusal.is_none() && !drain.has_begun();
        answer(stream, &request, identity, keep_alive)?;
        if !keep_alive {
            break;
        }
    }
    Ok(())
}

/// The next request; none when there will be no more. What follows it stays in `received`.
fn next_request(
    stream: &mut impl Read,
    received: &mut Vec<u8>,
    drain: &Drain,
) -> io::Result<Option<HttpRequest>> {
    let began_at = Instant::now();
    let mut chunk = [0; 2048];
    loop {
        if let Some((request, length)) = parse(received) {
            received.drain(..length);
            return Ok(Some(request));
        }
        if received.len() >= HEAD_BYTES_MAX {
            received.clear();
            return Ok(Some(HttpRequest::refused(431)));
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(bytes) => received.extend_from_slice(&chunk[..bytes]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let limit = if received.is_empty() { IDLE_TIME_MAX } else { HEAD_TIME_MAX };
                let last_call =
                    received.is_empty() && drain.begun_for().is_some_and(|time| time > LAST_CALL_TIME);
                if last_call || began_at.elapsed() > limit {
                    return Ok(None);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl HttpRequest {
    fn refused(status: u16) -> HttpRequest {
        let (method, target) = ("-".to_owned(), "-".to_owned());
        HttpRequest { method, target, is_head: false, keep_alive: false, refusal: Some(status) }
    }
}

/// A whole head and its length; none if there is more to come.
fn parse(received: &[u8]) -> Option<(HttpRequest, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(received) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(length)) => length,
        Err(_) => return Some((HttpRequest::refused(400), received.len())),
    };
    let has_body = head.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || (header.name.eq_ignore_ascii_case("content-length") && header.value != b"0")
    });
    let closes = head.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("connection")
            && String::from_utf8_lossy(header.value)
                .split(',')
                .any(|word| word.trim().eq_ignore_ascii_case("close"))
    });
    let method = head.method.unwrap_or("-");
    let refusal = match method {
        "GET" | "HEAD" if has_body => Some(413),
        "GET" | "HEAD" => None,
        _ => Some(405),
    };
    let request = HttpRequest {
        method: method.to_owned(),
        target: head.path.unwrap_or("-").to_owned(),
        is_head: method == "HEAD",
        keep_alive: head.version == Some(1) && !closes,
        refusal,
    };
    Some((request, length))
}

fn route(target: &str) -> Route {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/" => Route::Hello,
        "/healthz" => Route::Health,
        "/crash" => Route::Crash,
        _ if path.starts_with("/run/secrets/") && !path.contains("..") => Route::Secret(path.to_owned()),
        "/big" => query
            .split('&')
            .find_map(|pair| pair.strip_prefix("bytes=")?.parse().ok())
            .filter(|bytes| *bytes <= BIG_BYTES_MAX)
            .map_or(Route::Missing, Route::Big),
        _ => Route::Missing,
    }
}

fn answer(
    stream: &mut impl Write,
    request: &HttpRequest,
    identity: &Identity,
    keep_alive: bool,
) -> io::Result<()> {
    let Identity { release, instance } = identity;
    let (status, body, length) = match (request.refusal, route(&request.target)) {
        (Some(status), _) => (status, String::new(), 0),
        (None, Route::Hello) => {
            let body = format!("hello from release {release} instance {instance}\n");
            (200, body.clone(), body.len() as u64)
        }
        (None, Route::Health) => (200, "ok\n".to_owned(), 3),
        (None, Route::Big(bytes)) => (200, String::new(), bytes),
        (None, Route::Secret(path)) => {
            use std::os::unix::fs::MetadataExt;
            let read = std::fs::metadata(&path).and_then(|m| Ok((m, std::fs::read_to_string(&path)?)));
            let body = match read {
                Ok((m, text)) => {
                    // What a careless workload does; its node must not store it.
                    log(format_args!("{text}"));
                    format!("{:o} {}\n{text}", m.mode() & 0o7777, m.uid())
                }
                Err(error) => format!("{error}\n"),
            };
            (200, body.clone(), body.len() as u64)
        }
        (None, Route::Missing) => (404, "no such page\n".to_owned(), 13),
        (None, Route::Crash) => {
            log(format_args!("{} {} aborting", request.method, request.target));
            std::process::abort();
        }
    };
    let connection = if keep_alive { "keep-alive" } else { "close" };
    write!(
        stream,
        "HTTP/1.1 {status} {}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: {connection}\r\n\r\n",
        reason(status)
    )?;
    if !request.is_head {
        if body.is_empty() { write_big(stream, length)? } else { stream.write_all(body.as_bytes())? }
    }
    stream.flush()?;
    log(format_args!("{} {} {status} {length}", request.method, request.target));
    Ok(())
}

fn write_big(stream: &mut impl Write, bytes: u64) -> io::Result<()> {
    let chunk = [b'x'; BIG_CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
        stream.write_all(&chunk[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Error",
    }
}

/// One line on standard output. That nobody reads it is no reason to end.
pub(crate) fn log(line: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that has sent everything and reads everything.
    struct Peer {
        sent: io::Cursor<Vec<u8>>,
        got: Vec<u8>,
    }

    impl Read for Peer {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.sent.read(buffer)
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.got.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn exchange(sent: &str, drain: &Drain) -> String {
        let mut peer = Peer { sent: io::Cursor::new(sent.into()), got: Vec::new() };
        let identity = Identity { release: "7".into(), instance: "i-1".into() };
        serve_connection(&mut peer, &identity, drain).unwrap();
        String::from_utf8(peer.got).unwrap()
    }

    #[test]
    fn requests_on_one_connection_are_answered_in_turn() {
        let got = exchange(
            "GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD /big?bytes=70000 HTTP/1.1\r\n\r\nGET /big?bytes=20000 HTTP/1.1\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            &Drain::new(1),
        );
        let parts: Vec<_> = got.split("HTTP/1.1 200 OK\r\n").collect();
        assert_eq!(parts.len(), 4, "{got}");
        assert!(parts[1].ends_with("\r\n\r\nhello from release 7 instance i-1\n"));
        assert!(parts[1].contains("connection: keep-alive"));
        assert!(parts[2].contains("content-length: 70000") && parts[2].ends_with("\r\n\r\n"));
        assert!(parts[3].contains("connection: close") && parts[3].ends_with(&"x".repeat(20_000)));
    }

    #[test]
    fn bad_requests_are_answered_and_end_the_connection() {
        for (sent, status) in [
            ("nonsense\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n", 405),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
            (&format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(HEAD_BYTES_MAX)), 431),
        ] {
            let got = exchange(sent, &Drain::new(1));
            assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{got}");
            assert_eq!(got.matches("HTTP/1.1").count(), 1, "{got}");
        }
        assert!(exchange("GET /x HTTP/1.1\r\n\r\n", &Drain::new(1)).starts_with("HTTP/1.1 404"));
        assert!(
            exchange("GET /big?bytes=9999999999 HTTP/1.1\r\n\r\n", &Drain::new(1))
                .starts_with("HTTP/1.1 404")
        );
    }

    #[test]
    fn a_request_in_flight_is_answered_while_the_server_ends() {
        let drain = Drain::new(1);
        drain.begin();
        let got = exchange("GET /healthz HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n", &drain);
        assert!(got.contains("connection: close") && got.ends_with("ok\n"), "{got}");
    }
}

//! Health checks over the network, each in a short-lived thread: what they wait for must not hold up PID 1.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use holdfast_guest::message::HealthCheck;

/// The most bytes of an HTTP answer that are read: its status line is all that counts.
const STATUS_LINE_BYTES_MAX: usize = 256;

/// Runs a check that needs no process, within its time-out; an error is a sentence for the operator.
pub(crate) fn check_network(address: IpAddr, check: &HealthCheck, timeout: Duration) -> Result<(), String> {
    match check {
        HealthCheck::Tcp { port } => connect(address, *port, timeout).map(drop),
        HealthCheck::Http { port, path } => http(address, *port, path, timeout),
        HealthCheck::Command { .. } => Err("A command is not checked over the network.".to_owned()),
    }
}

fn connect(address: IpAddr, port: u16, timeout: Duration) -> Result<TcpStream, String> {
    TcpStream::connect_timeout(&SocketAddr::new(address, port), timeout)
        .map_err(|error| format!("Port {port} of {address} did not accept a connection ({error})."))
}

fn http(address: IpAddr, port: u16, path: &str, timeout: Duration) -> Result<(), String> {
    if !path.starts_with('/') || path.contains(|c: char| c.is_control() || c == ' ') {
        return Err(format!("'{}' is not the path of a request.", path.escape_debug()));
    }
    let started_at = Instant::now();
    let mut stream = connect(address, port, timeout)?;
    let failed = |error: io::Error| format!("Port {port} did not answer a request in time ({error}).");
    let host = match address {
        IpAddr::V6(address) => format!("[{address}]:{port}"),
        IpAddr::V4(address) => format!("{address}:{port}"),
    };
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: holdfast\r\nConnection: close\r\n\r\n");
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut line = Vec::new();
    let mut chunk = [0; STATUS_LINE_BYTES_MAX];
    while !line.contains(&b'\n') && line.len() < STATUS_LINE_BYTES_MAX {
        let left = timeout
            .checked_sub(started_at.elapsed())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| failed(io::ErrorKind::TimedOut.into()))?;
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut chunk).map_err(failed)? {
            0 => break,
            read => line.extend(chunk.iter().take(read)),
        }
    }
    match status_of(&line) {
        Some(status) if (200..400).contains(&status) => Ok(()),
        Some(status) => Err(format!("GET {path} was answered with status {status}.")),
        None => Err(format!("GET {path} was not answered in HTTP.")),
    }
}

fn status_of(line: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(line.split(|byte| *byte == b'\r' || *byte == b'\n').next()?).ok()?;
    text.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpListener};

    use super::*;

    fn serve_once(answer: &'static [u8]) -> u16 {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /up HTTP/1.1\r\n"));
            stream.write_all(answer).unwrap();
        });
        port
    }

    fn http_verdict(answer: &'static [u8]) -> Result<(), String> {
        let check = HealthCheck::Http { port: serve_once(answer), path: "/up".to_owned() };
        check_network(Ipv6Addr::LOCALHOST.into(), &check, Duration::from_secs(30))
    }

    #[test]
    fn only_success_and_redirects_are_healthy() {
        assert_eq!(http_verdict(b"HTTP/1.1 200 OK\r\n\r\n"), Ok(()));
        assert_eq!(http_verdict(b"HTTP/1.0 302 Found\r\n\r\n"), Ok(()));
        let unhealthy = http_verdict(b"HTTP/1.1 503 Busy\r\n\r\n").unwrap_err();
        assert!(unhealthy.contains("503"), "{unhealthy}");
    }

    #[test]
    fn i14_answers_that_are_not_http_are_unhealthy() {
        for answer in [&b""[..], b"\xff\xfe\r\n", b"HTTP/1.1\r\n", b"HTTP/1.1 99999 no\r\n", b"\r\n\r\n"] {
            let verdict = http_verdict(answer).unwrap_err();
            assert!(verdict.contains("not answered in HTTP"), "{verdict}");
        }
    }

    #[test]
    fn a_path_cannot_smuggle_a_header() {
        let check = HealthCheck::Http { port: 1, path: "/ HTTP/1.1\r\nX: y".to_owned() };
        let refused = check_network(Ipv6Addr::LOCALHOST.into(), &check, Duration::from_secs(1)).unwrap_err();
        assert!(refused.contains("not the path"), "{refused}");
    }
}

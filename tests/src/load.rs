//! A client that never stops: real TLS requests through an edge by hostname, one connection each, from several threads.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Samples that are kept at most.
const SAMPLES_MAX: usize = 1_000_000;
/// An answer is read up to this many bytes.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Why a request cannot even be prepared.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The certificate to trust.
    #[error("the certificate to trust cannot be used")]
    Trust(#[source] rustls::Error),
    /// The certificate to trust.
    #[error("the certificate to trust cannot be read")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// The hostname.
    #[error("{hostname} cannot be a server's name")]
    Name {
        /// Which.
        hostname: String,
    },
}

/// Where requests go and what is checked.
#[derive(Clone, Debug)]
pub struct Target {
    /// The edge's address and port.
    pub address: SocketAddr,
    hostname: String,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    /// How long one request may take before it counts as failed.
    pub timeout: Duration,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it began.
    pub began: Instant,
    /// When it ended.
    pub ended: Instant,
    /// The body, or why there is none.
    pub outcome: Result<String, String>,
}

impl Target {
    /// `hostname` at the edge's `address`, trusting `ca_pem` alone.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn new(address: SocketAddr, hostname: &str, ca_pem: &str) -> Result<Target, LoadError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            roots.add(certificate.map_err(LoadError::Pem)?).map_err(LoadError::Trust)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(LoadError::Trust)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(hostname.to_owned())
            .map_err(|_| LoadError::Name { hostname: hostname.to_owned() })?;
        Ok(Target {
            address,
            hostname: hostname.to_owned(),
            name,
            config: Arc::new(config),
            timeout: Duration::from_secs(10),
        })
    }

    /// One request on a connection of its own: the body, or why there is none.
    pub fn get(&self, path: &str) -> Sample {
        let began = Instant::now();
        let outcome = self.exchange(path).map_err(|e| e.to_string());
        Sample { began, ended: Instant::now(), outcome }
    }

    fn exchange(&self, path: &str) -> io::Result<String> {
        let socket = TcpStream::connect_timeout(&self.address, self.timeout)?;
        socket.set_read_timeout(Some(self.timeout))?;
        socket.set_write_timeout(Some(self.timeout))?;
        socket.set_nodelay(true)?;
        let tls =
            ClientConnection::new(Arc::clone(&self.config), self.name.clone()).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(tls, socket);
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.hostname)?;
        stream.flush()?;
        let mut answer = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
        let (head, body) =
            answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("the answer has no head"))?;
        if head.starts_with("HTTP/1.1 200 ") {
            Ok(body.to_owned())
        } else {
            Err(io::Error::other(format!("the answer is {}", head.lines().next().unwrap_or_default())))
        }
    }
}

/// Requests that go on until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Begins, with this many threads, each pausing so long between two requests.
    pub fn start(target: &Target, threads: usize, pause: Duration) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let samples = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..threads).map(|_| {
            let (target, stop, samples) = (target.clone(), Arc::clone(&stop), Arc::clone(&samples));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let sample = target.get("/");
                    let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
                    if samples.len() < SAMPLES_MAX {
                        samples.push(sample);
                    }
                    drop(samples);
                    std::thread::sleep(pause);
                }
            })
        });
        let threads = threads.collect();
        Load { stop, samples, threads }
    }

    /// Requests that ended so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the load and returns every request.
    pub fn stop(mut self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic there would be a defect of this file; its samples still count.
            let _ = thread.join();
        }
        self.samples()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What happened in a span of time.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that ended in it.
    pub sent: usize,
    /// Those that failed.
    pub failed: usize,
    /// Why, the first few.
    pub reasons: Vec<String>,
    /// The slowest that succeeded.
    pub slowest: Duration,
}

/// Reasons that a [`Tally`] keeps.
const REASONS_MAX: usize = 3;

impl Tally {
    /// Of the requests that began at or after `from` and before `to`.
    pub fn of(samples: &[Sample], from: Instant, to: Instant) -> Tally {
        let mut tally = Tally::default();
        for sample in samples.iter().filter(|s| s.began >= from && s.began < to) {
            tally.sent += 1;
            match &sample.outcome {
                Ok(_) => tally.slowest = tally.slowest.max(sample.ended - sample.began),
                Err(reason) => {
                    tally.failed += 1;
                    if tally.reasons.len() < REASONS_MAX && !tally.reasons.contains(reason) {
                        tally.reasons.push(reason.clone());
                    }
                }
            }
        }
        tally
    }
}

/// From `cut` until a request that began after it had succeeded.
pub fn outage(samples: &[Sample], cut: Instant) -> Option<Duration> {
    let served = samples.iter().filter(|s| s.began >= cut && s.outcome.is_ok());
    served.map(|s| s.ended - cut).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outages_and_tallies_are_counted_from_when_requests_began() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let sample = |from, to, outcome: Result<&str, &str>| Sample {
            began: at(from),
            ended: at(to),
            outcome: outcome.map(str::to_owned).map_err(str::to_owned),
        };
        let samples = [
            sample(0, 5, Ok("a")),
            sample(8, 30, Ok("b")),
            sample(12, 14, Err("x")),
            sample(20, 45, Ok("c")),
        ];
        assert_eq!(outage(&samples, at(10)), Some(Duration::from_millis(35)));
        assert_eq!(outage(&samples, at(50)), None);
        let tally = Tally::of(&samples, at(8), at(20));
        assert_eq!((tally.sent, tally.failed, tally.slowest), (2, 1, Duration::from_millis(22)));
    }
}

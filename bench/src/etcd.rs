//! Three members of Debian's etcd, with TLS for clients and between members, on the same disk.
//!
//! The write is `Put` of 256 bytes under a fresh key, the read a linearizable `Range` of one key. The few messages are
//! written down here as etcd's public API defines them.

use crate::holdfast::{trusting, write_private};
use crate::line::{Ask, Dialler, Told};
use crate::system::{Cluster, Kind, MEMBERS, Protocol, free_addresses};
use bytes::{BufMut, Bytes, BytesMut};
use holdfast_bench::error::BenchError;
use holdfast_bench::history::mixed;
use holdfast_bench::process::Process;
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, StatusCode};
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::ServerName;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Mutex;

/// Bytes of a value.
pub const VALUE_BYTES: usize = 256;
/// The key that reads ask for.
const READ_KEY: &[u8] = b"bench/read";
/// Bytes before a gRPC message: not compressed, and its length.
const PREFIX_BYTES: usize = 5;

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    /// The first key that is not meant; empty for one key.
    #[prost(bytes = "bytes", tag = "2")]
    range_end: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
struct RequestOp {
    #[prost(message, optional, tag = "2")]
    request_put: Option<PutRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create_request: Option<RangeRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

#[derive(Clone, PartialEq, Message)]
struct MemberListRequest {}

#[derive(Clone, PartialEq, Message)]
struct MemberListResponse {
    #[prost(message, repeated, tag = "2")]
    members: Vec<Member>,
}

#[derive(Clone, PartialEq, Message)]
struct Member {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    name: String,
}

struct Grpc {
    value: Bytes,
    /// Members' ids in the order of their names, once they are known.
    ids: Mutex<Vec<u64>>,
}

fn broken(what: &str, why: impl ToString) -> BenchError {
    BenchError::Answer { what: what.to_owned(), why: why.to_string() }
}

fn call(method: &str, message: &impl Message) -> Result<Ask, BenchError> {
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(PREFIX_BYTES + length);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).map_err(|e| broken("a message", e))?);
    message.encode(&mut body).map_err(|e| broken("a message", e))?;
    let head = Request::builder()
        .method(Method::POST)
        .uri(format!("https://localhost/etcdserverpb.{method}"))
        .header(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))
        .header(TE, HeaderValue::from_static("trailers"))
        .body(())
        .map_err(|e| broken("a request", e))?;
    Ok(Ask { head, body: body.freeze() })
}

fn message<M: Message + Default>(told: &Told) -> Result<M, BenchError> {
    let body = told.body.get(PREFIX_BYTES..).ok_or_else(|| broken("an answer", "it is too short"))?;
    M::decode(body).map_err(|e| broken("an answer", e))
}

fn is_good(told: &Told) -> Result<(), BenchError> {
    let status = told.trailers.get("grpc-status").and_then(|v| v.to_str().ok());
    if told.status == StatusCode::OK && status == Some("0") {
        return Ok(());
    }
    let why = told.trailers.get("grpc-message").and_then(|v| v.to_str().ok()).unwrap_or("no message");
    Err(broken("etcd", format!("{} grpc {status:?}: {why}", told.status)))
}

impl Protocol for Grpc {
    fn ask(&self, kind: Kind) -> Result<Ask, BenchError> {
        match kind {
            Kind::Read => {
                call("KV/Range", &RangeRequest { key: Bytes::from_static(READ_KEY), range_end: Bytes::new() })
            }
            Kind::Write(n) => {
                let key = Bytes::from(format!("bench-{:026}", mixed(n)));
                call("KV/Put", &PutRequest { key, value: self.value.clone() })
            }
        }
    }

    fn check(&self, kind: Kind, told: &Told) -> Result<(), BenchError> {
        is_good(told)?;
        match kind {
            Kind::Write(_) => Ok(()),
            Kind::Read if message::<RangeResponse>(told)?.count == 1 => Ok(()),
            Kind::Read => Err(broken("a read", "the key is not there")),
        }
    }

    fn ask_leader(&self) -> Result<Ask, BenchError> {
        call("Maintenance/Status", &StatusRequest {})
    }

    fn leader(&self, told: &Told) -> Option<usize> {
        is_good(told).ok()?;
        let leader = message::<StatusResponse>(told).ok()?.leader;
        self.ids.lock().ok()?.iter().position(|id| *id == leader && leader != 0)
    }

    fn ask_revision(&self) -> Result<Option<Ask>, BenchError> {
        Ok(None)
    }

    fn watch(&self, _: Option<&Told>) -> Result<Ask, BenchError> {
        // A watch's key and range end have the numbers of a range's.
        let keys =
            RangeRequest { key: Bytes::from_static(b"bench-"), range_end: Bytes::from_static(b"bench.") };
        call("Watch/Watch", &WatchRequest { create_request: Some(keys) })
    }

    fn scan(&self, group: &str) -> Result<Ask, BenchError> {
        let key = Bytes::from(format!("fill-{group}"));
        let range_end = Bytes::from(format!("fill-{group}g"));
        call("KV/Range", &RangeRequest { key, range_end })
    }

    fn scanned(&self, told: &Told) -> Result<u64, BenchError> {
        is_good(told)?;
        u64::try_from(message::<RangeResponse>(told)?.count).map_err(|e| broken("a scan", e))
    }
}

/// Hexadecimal digits of a key that make a group of a scan: about 16 of a million keys share them.
const GROUP_DIGITS: usize = 4;
/// Puts of one transaction: etcd's own limit.
const TXN_PUTS: u64 = 128;
/// Transactions under way while keys are filled in.
const TXNS_IN_FLIGHT: usize = 24;

/// Puts so many keys of [`VALUE_BYTES`] each; answers with the groups that a scan of them all is made of.
pub async fn fill(cluster: &Cluster, keys: u64) -> Result<Vec<String>, BenchError> {
    let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
    let leader = cluster.leader().await?;
    let line = cluster.dial(leader).await?;
    let batches = (0..keys).step_by(usize::try_from(TXN_PUTS).unwrap_or(1)).map(|first| {
        let (mut line, value) = (line.clone(), value.clone());
        async move {
            let put = |n: u64| RequestOp {
                request_put: Some(PutRequest {
                    key: Bytes::from(format!("fill-{:016x}", mixed(n))),
                    value: value.clone(),
                }),
            };
            let success = (first..keys.min(first + TXN_PUTS)).map(put).collect();
            is_good(&line.ask(call("KV/Txn", &TxnRequest { success })?).await?)
        }
    });
    use futures::{StreamExt, TryStreamExt};
    futures::stream::iter(batches).buffer_unordered(TXNS_IN_FLIGHT).try_collect::<()>().await?;
    let groups = 1_u64 << (4 * GROUP_DIGITS);
    Ok((0..groups).map(|n| format!("{n:0width$x}", width = GROUP_DIGITS)).collect())
}

/// Makes and starts a cluster in `folder`, and waits until all three serve.
pub async fn start(program: &Path, folder: &Path) -> Result<Cluster, BenchError> {
    let tls = |e: &dyn std::fmt::Display| BenchError::Tls(e.to_string());
    let authority_key = KeyPair::generate().map_err(|e| tls(&e))?;
    let mut authority = CertificateParams::new(Vec::new()).map_err(|e| tls(&e))?;
    // Another name than the members': who signed is told by name.
    authority.distinguished_name.push(DnType::CommonName, "benchmark authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority_certificate = authority.self_signed(&authority_key).map_err(|e| tls(&e))?;
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().map_err(|e| tls(&e))?;
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let mut leaf = CertificateParams::new(names).map_err(|e| tls(&e))?;
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = leaf.signed_by(&key, &issuer).map_err(|e| tls(&e))?;
    let (ca_file, cert_file, key_file) =
        (folder.join("ca.pem"), folder.join("cert.pem"), folder.join("key.pem"));
    write_private(&ca_file, authority_certificate.pem().as_bytes())?;
    write_private(&cert_file, leaf.pem().as_bytes())?;
    write_private(&key_file, key.serialize_pem().as_bytes())?;

    let addresses = free_addresses(MEMBERS * 2)?;
    let (clients, peers) = addresses.split_at(MEMBERS);
    let cluster: Vec<_> = peers.iter().enumerate().map(|(i, p)| format!("m{}=https://{p}", i + 1)).collect();
    let cluster = cluster.join(",");
    let processes = (0..MEMBERS).map(|i| {
        let name = format!("m{}", i + 1);
        let mut arguments: Vec<OsString> = Vec::new();
        let mut flag = |flag: &str, value: &dyn AsRef<std::ffi::OsStr>| {
            arguments.push(flag.into());
            arguments.push(value.as_ref().into());
        };
        flag("--name", &name);
        flag("--data-dir", &folder.join(&name));
        flag("--listen-client-urls", &format!("https://{}", clients[i]));
        flag("--advertise-client-urls", &format!("https://{}", clients[i]));
        flag("--listen-peer-urls", &format!("https://{}", peers[i]));
        flag("--initial-advertise-peer-urls", &format!("https://{}", peers[i]));
        flag("--initial-cluster", &cluster);
        flag("--initial-cluster-state", &"new");
        flag("--logger", &"zap");
        flag("--log-level", &"error");
        flag("--cert-file", &cert_file);
        flag("--key-file", &key_file);
        flag("--peer-cert-file", &cert_file);
        flag("--peer-key-file", &key_file);
        flag("--peer-trusted-ca-file", &ca_file);
        // Its default of 2 GiB would end a long run.
        flag("--quota-backend-bytes", &"8589934592");
        arguments.push("--peer-client-cert-auth".into());
        Process::new(&format!("etcd {name}"), program, arguments, folder.join(format!("{name}.log")))
    });
    let name = ServerName::try_from("localhost").map_err(|e| tls(&e))?;
    let mut found = Cluster {
        name: "etcd",
        processes: processes.collect(),
        addresses: clients.to_vec(),
        dialler: Dialler { tls: trusting(authority_certificate.der().clone())?, name },
        protocol: Box::new(Grpc { value: Bytes::new(), ids: Mutex::default() }),
    };
    for process in &mut found.processes {
        process.start()?;
    }
    // Random bytes are worth nothing here: etcd compresses nothing.
    let value = Bytes::from(vec![b'v'; VALUE_BYTES]);
    let ids = found_ids(&found).await?;
    let put = PutRequest { key: Bytes::from_static(READ_KEY), value: value.clone() };
    let told = found.dial(0).await?.ask(call("KV/Put", &put)?).await?;
    is_good(&told)?;
    found.protocol = Box::new(Grpc { value, ids: Mutex::new(ids) });
    for i in 0..MEMBERS {
        found.serves(i).await?;
    }
    Ok(found)
}

/// Members' ids by the order of their names, once a member knows them.
async fn found_ids(cluster: &Cluster) -> Result<Vec<u64>, BenchError> {
    let until = std::time::Instant::now() + crate::system::READY_MAX;
    while std::time::Instant::now() < until {
        if let Ok(mut line) = cluster.dial(0).await
            && let Ok(told) = line.ask(call("Cluster/MemberList", &MemberListRequest {})?).await
            && is_good(&told).is_ok()
        {
            let mut members = message::<MemberListResponse>(&told)?.members;
            // Names come with a member's first start.
            if members.len() == MEMBERS && members.iter().all(|m| !m.name.is_empty()) {
                members.sort_by(|a, b| a.name.cmp(&b.name));
                return Ok(members.iter().map(|m| m.id).collect());
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Err(BenchError::Slow { what: "the members of etcd".into(), seconds: crate::system::READY_MAX.as_secs() })
}

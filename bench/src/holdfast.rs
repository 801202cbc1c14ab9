//! Three Holdfast members, made and run as an operator would.
//!
//! The write is `POST /v1/orgs/{org}/apps`: the cheapest mutation of a tenant's resource. It carries an idempotency key
//! as every client of ours does, so one write stores the app, its name in an index, an event, and the outcome under its
//! key. The read is `GET /v1/orgs/{org}`, linearizable, which also checks the caller's token in the view it reads.

use crate::line::{Ask, Dialler, Told};
use crate::system::{Cluster, Kind, MEMBERS, Protocol, free_addresses};
use bytes::Bytes;
use holdfast_bench::error::BenchError;
use holdfast_bench::history::mixed;
use holdfast_bench::process::{Process, run};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, StatusCode};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Below which every cluster's certificates have their names.
const SERVER_DOMAIN: &str = "holdfast.internal";
/// How a token's secret is passed to `server join`.
const SECRET_FILE: &str = "join.secret";

struct Http {
    authorization: HeaderValue,
    org: String,
}

fn broken(what: &str, why: impl ToString) -> BenchError {
    BenchError::Answer { what: what.to_owned(), why: why.to_string() }
}

impl Http {
    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Ask, BenchError> {
        let mut head = Request::builder()
            .method(method)
            .uri(format!("https://holdfast.invalid{path}"))
            .header(AUTHORIZATION, self.authorization.clone());
        if !body.is_empty() {
            head = head.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let head = head.body(()).map_err(|e| broken("a request", e))?;
        Ok(Ask { head, body })
    }
}

impl Protocol for Http {
    fn ask(&self, kind: Kind) -> Result<Ask, BenchError> {
        match kind {
            Kind::Read => self.request(Method::GET, &format!("/v1/orgs/{}", self.org), Bytes::new()),
            Kind::Write(n) => {
                // As long as a name may be.
                let name = format!("bench-{:026}", mixed(n));
                let body = Bytes::from(format!("{{\"name\":\"{name}\"}}"));
                let mut ask = self.request(Method::POST, &format!("/v1/orgs/{}/apps", self.org), body)?;
                let key = HeaderValue::from_str(&name).map_err(|e| broken("an idempotency key", e))?;
                ask.head.headers_mut().insert("idempotency-key", key);
                Ok(ask)
            }
        }
    }

    fn check(&self, kind: Kind, told: &Told) -> Result<(), BenchError> {
        let wanted = if kind == Kind::Read { StatusCode::OK } else { StatusCode::CREATED };
        if told.status == wanted {
            return Ok(());
        }
        let body = String::from_utf8_lossy(&told.body).into_owned();
        Err(broken(&format!("{kind:?}"), format!("{} {body}", told.status)))
    }

    fn ask_leader(&self) -> Result<Ask, BenchError> {
        self.request(Method::GET, "/v1/cluster?consistency=stale", Bytes::new())
    }

    fn leader(&self, told: &Told) -> Option<usize> {
        let answer: Value = serde_json::from_slice(&told.body).ok()?;
        let leader = &answer["item"]["leader"];
        let id = leader.as_u64().or_else(|| leader.as_str()?.parse().ok())?;
        usize::try_from(id.checked_sub(1)?).ok().filter(|place| *place < MEMBERS)
    }

    fn ask_revision(&self) -> Result<Option<Ask>, BenchError> {
        self.request(Method::GET, "/v1/events?limit=1", Bytes::new()).map(Some)
    }

    fn watch(&self, revision: Option<&Told>) -> Result<Ask, BenchError> {
        let told = revision.ok_or_else(|| broken("a watch", "the revision is not known"))?;
        let page: Value = serde_json::from_slice(&told.body).map_err(|e| broken("the revision", e))?;
        let revision = &page["revision"];
        let revision = revision.as_str().map(str::to_owned).unwrap_or_else(|| revision.to_string());
        self.request(Method::GET, &format!("/v1/events?follow=true&after={revision}"), Bytes::new())
    }

    fn scan(&self, group: &str) -> Result<Ask, BenchError> {
        self.request(Method::GET, &format!("/v1/envs/{group}/instances"), Bytes::new())
    }

    fn scanned(&self, told: &Told) -> Result<u64, BenchError> {
        self.check(Kind::Read, told)?;
        let page: Value = serde_json::from_slice(&told.body).map_err(|e| broken("a scan", e))?;
        let rows = page["items"].as_array().ok_or_else(|| broken("a scan", "it has no items"))?;
        Ok(rows.len() as u64)
    }
}

/// Makes and starts a cluster in `folder`, and waits until all three vote.
pub async fn start(program: &Path, folder: &Path) -> Result<Cluster, BenchError> {
    let log = folder.join("commands.log");
    let addresses = free_addresses(MEMBERS * 2)?;
    let (apis, rafts) = addresses.split_at(MEMBERS);
    let place = |i: usize| folder.join(format!("m{}", i + 1));
    let token_file = folder.join("operator.token");
    let member = |action: &str, i: usize| {
        let mut command = Command::new(program);
        command
            .args(["server", action, "--json", "--name", &format!("m{}", i + 1), "--data-dir"])
            .arg(place(i));
        command.args(["--api-addr", &apis[i].to_string(), "--raft-addr", &rafts[i].to_string()]);
        command
    };
    let mut init = member("init", 0);
    init.arg("--token-file").arg(&token_file);
    let printed = run("server init", init, &log).await?;
    let made: Value = serde_json::from_slice(&printed).map_err(|e| broken("server init", e))?;
    let text =
        |name: &str| made[name].as_str().map(str::to_owned).ok_or_else(|| broken("server init", &made));
    let (cluster, ca_pin) = (text("cluster")?, text("ca_pin")?);
    let token = std::fs::read_to_string(&token_file).map_err(BenchError::file(&token_file))?;
    let mut authorization = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|e| broken("the operator's token", e))?;
    authorization.set_sensitive(true);

    let processes = (0..MEMBERS).map(|i| {
        let arguments = vec!["server".into(), "run".into(), "--data-dir".into(), place(i).into()];
        Process::new(
            &format!("holdfast member {}", i + 1),
            program,
            arguments,
            folder.join(format!("m{}.log", i + 1)),
        )
    });
    let mut found = Cluster {
        name: "holdfast",
        processes: processes.collect(),
        addresses: apis.to_vec(),
        dialler: dialler(&place(0).join("authority.pem"), &cluster)?,
        protocol: Box::new(Http { authorization: authorization.clone(), org: String::new() }),
    };
    found.processes[0].start()?;
    found.leader().await?;
    let http = Http { authorization: authorization.clone(), org: String::new() };
    for i in 1..MEMBERS {
        let ask =
            http.request(Method::POST, "/v1/enrolments", Bytes::from_static(b"{\"kind\":\"member\"}"))?;
        let invited = item(&found, ask, "an invitation").await?;
        let secret = invited["secret"].as_str().ok_or_else(|| broken("an invitation", "it has no secret"))?;
        let secret_file = folder.join(SECRET_FILE);
        write_private(&secret_file, secret.as_bytes())?;
        let mut join = member("join", i);
        join.args(["--server", &format!("https://{}", apis[0]), "--ca-pin", &ca_pin, "--secret-file"]);
        join.arg(&secret_file);
        let joined = run("server join", join, &log).await;
        std::fs::remove_file(&secret_file).map_err(BenchError::file(&secret_file))?;
        joined?;
        found.processes[i].start()?;
        wait_for_voters(&found, &http, i + 1).await?;
    }
    let ask = http.request(Method::POST, "/v1/orgs", Bytes::from_static(b"{\"name\":\"bench\"}"))?;
    let org = item(&found, ask, "an org").await?;
    let org = org["id"].as_str().ok_or_else(|| broken("an org", "it has no id"))?.to_owned();
    found.protocol = Box::new(Http { authorization, org });
    for i in 0..MEMBERS {
        found.serves(i).await?;
    }
    Ok(found)
}

async fn item(cluster: &Cluster, ask: Ask, what: &str) -> Result<Value, BenchError> {
    let told = cluster.dial(0).await?.ask(ask).await?;
    let mut answer: Value = serde_json::from_slice(&told.body).map_err(|e| broken(what, e))?;
    if told.status.is_success() { Ok(answer["item"].take()) } else { Err(broken(what, answer)) }
}

async fn wait_for_voters(cluster: &Cluster, http: &Http, wanted: usize) -> Result<(), BenchError> {
    let until = std::time::Instant::now() + crate::system::READY_MAX;
    while std::time::Instant::now() < until {
        if let Ok(status) = item(cluster, http.ask_leader()?, "the cluster").await {
            let members = status["members"].as_array().map(Vec::as_slice).unwrap_or_default();
            if members.iter().filter(|m| m["role"] == "voter").count() >= wanted {
                return Ok(());
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let what = format!("{wanted} voters of holdfast");
    Err(BenchError::Slow { what, seconds: crate::system::READY_MAX.as_secs() })
}

fn dialler(authority: &Path, cluster: &str) -> Result<Dialler, BenchError> {
    let tls = |e: &dyn std::fmt::Display| BenchError::Tls(e.to_string());
    let certificate = CertificateDer::from_pem_file(authority).map_err(|e| tls(&e))?;
    let name = format!("{}.{SERVER_DOMAIN}", cluster.to_ascii_lowercase().replace('_', "-"));
    let name = ServerName::try_from(name).map_err(|e| tls(&e))?;
    Ok(Dialler { tls: trusting(certificate)?, name })
}

/// A client's TLS that trusts one authority: TLS 1.3, HTTP/2.
pub fn trusting(authority: CertificateDer<'_>) -> Result<Arc<ClientConfig>, BenchError> {
    let tls = |e: rustls::Error| BenchError::Tls(e.to_string());
    let mut roots = RootCertStore::empty();
    roots.add(authority.into_owned()).map_err(tls)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Writes a file that nobody else may read.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), BenchError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(bytes)).map_err(BenchError::file(path))
}

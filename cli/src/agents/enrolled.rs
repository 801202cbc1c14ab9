//! Joining as an agent, and what an agent keeps of it: who it is, whom it trusts, and where the members are.
//!
//! `agent.json` is written last: a folder that has it has everything. The agent needs no control plane to come back from
//! it (I5).

use crate::args::Global;
use crate::args::operator::Join;
use crate::commands::secret_text;
use crate::failure::{Failure, with_sources};
use crate::session::endpoints;
use holdfast_client::{Client, Endpoint};
use holdfast_identity::files::{read_secret, write_secret};
use holdfast_identity::{CaCertificate, CertificateError, Credential, Fingerprint, PrivateKey};
use holdfast_model::api::{Answer, Enrol, EnrolAnswer};
use holdfast_model::command::Joiner;
use holdfast_model::resource::Enrolled;
use holdfast_model::{ClusterId, Incarnation};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const AGENT_FILE: &str = "agent.json";
const CA_FILE: &str = "ca.pem";
const CREDENTIAL_FILE: &str = "credential.pem";

/// `agent.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentFile {
    cluster: ClusterId,
    incarnation: Incarnation,
    enrolled: Enrolled,
    /// Members' API addresses.
    members: Vec<String>,
}

/// An agent that has joined.
pub(crate) struct Agent {
    /// Its own folder.
    pub(crate) data_dir: PathBuf,
    /// The cluster.
    pub(crate) cluster: ClusterId,
    /// Whom it trusts.
    pub(crate) ca: CaCertificate,
    /// How it proves itself.
    pub(crate) credential: Credential,
    /// Where the members are.
    pub(crate) endpoints: Vec<Endpoint>,
    /// The members, through that.
    pub(crate) client: Client,
}

fn host(error: &dyn std::error::Error) -> Failure {
    Failure::Host(with_sources(error))
}

/// Joins the cluster as `joiner` and fills `data_dir`.
pub(crate) async fn join(
    data_dir: &Path,
    joiner: Joiner,
    from: Join,
    global: &Global,
) -> Result<Enrolled, Failure> {
    let agent_file = data_dir.join(AGENT_FILE);
    if agent_file.exists() {
        return Err(Failure::Host(format!(
            "{} belongs to an agent that has joined already; run it, or give a new folder.",
            data_dir.display()
        )));
    }
    let pin: Fingerprint =
        from.ca_pin.parse().map_err(|e: CertificateError| Failure::Usage(with_sources(&e)))?;
    let secret = secret_text::read(from.secret_file.as_deref(), "join secret", global.no_input)?;
    let key = PrivateKey::generate().map_err(|e| host(&e))?;
    let csr_pem = key.signing_request().map_err(|e| host(&e))?;
    let client = Client::first_contact(endpoints(&from.server)?, pin)?;
    let body = Enrol { secret: secret.to_string(), csr_pem, joiner };
    let answer: Answer<EnrolAnswer> = client.post("/v1/enrol", &body).await?;
    let answer = answer.item;
    let ca = CaCertificate::from_pem(&answer.ca_pem).map_err(|e| host(&e))?;
    if ca.fingerprint() != pin {
        return Err(Failure::Host(
            "The cluster answered with another CA than the pinned one; nothing was kept.".into(),
        ));
    }
    let credential = Credential::new(key, &answer.certificate_pem).map_err(|e| host(&e))?;
    credential.save(&data_dir.join(CREDENTIAL_FILE)).map_err(|e| host(&e))?;
    write_secret(&data_dir.join(CA_FILE), ca.pem().as_bytes()).map_err(|e| host(&e))?;
    let members = answer.members.iter().filter(|m| !m.removed).map(|m| m.api_addr.clone()).collect();
    let file = AgentFile {
        cluster: answer.cluster,
        incarnation: answer.incarnation,
        enrolled: answer.enrolled,
        members,
    };
    let text = serde_json::to_vec_pretty(&file).map_err(|e| host(&e))?;
    write_secret(&agent_file, &text).map_err(|e| host(&e))?;
    Ok(answer.enrolled)
}

impl Agent {
    /// Reads what joining left in `data_dir`. Touches no network.
    pub(crate) fn load(data_dir: &Path) -> Result<Self, Failure> {
        let path = data_dir.join(AGENT_FILE);
        if !path.exists() {
            return Err(Failure::Host(format!(
                "No agent has joined in {}; run `join` first.",
                data_dir.display()
            )));
        }
        let text = read_secret(&path).map_err(|e| host(&e))?;
        let file: AgentFile = serde_json::from_slice(&text)
            .map_err(|e| Failure::Host(format!("{} cannot be understood: {e}.", path.display())))?;
        let ca = read_secret(&data_dir.join(CA_FILE)).map_err(|e| host(&e))?;
        let ca = CaCertificate::from_pem(&String::from_utf8_lossy(&ca)).map_err(|e| host(&e))?;
        let credential = Credential::load(&data_dir.join(CREDENTIAL_FILE)).map_err(|e| host(&e))?;
        let endpoints = endpoints(&file.members)?;
        let client = Client::with_credential(endpoints.clone(), &ca, &credential)?;
        Ok(Self { data_dir: data_dir.to_owned(), cluster: file.cluster, ca, credential, endpoints, client })
    }

    /// Where the CA certificate is.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.data_dir.join(CA_FILE)
    }

    /// Where the credential is.
    pub(crate) fn credential_file(&self) -> PathBuf {
        self.data_dir.join(CREDENTIAL_FILE)
    }

    /// Keeps a renewed credential.
    pub(crate) fn keep(&self, credential: &Credential) -> Result<(), Failure> {
        credential.save(&self.credential_file()).map_err(|e| host(&e))
    }
}

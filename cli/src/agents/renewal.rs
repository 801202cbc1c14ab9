//! Renewing an agent's certificate at two thirds of its life, for as long as the agent runs.

use crate::agents::enrolled::Agent;
use crate::failure::{Failure, with_sources};
use holdfast_identity::{Credential, PrivateKey};
use holdfast_model::api::{Answer, Renew, Renewed};
use std::time::{Duration, SystemTime};

/// Between two tries while renewing fails; it is begun long before the certificate ends.
const RETRY_AFTER: Duration = Duration::from_secs(600);
/// Longest sleep at a time: a clock that was set forward is noticed.
const LOOK_EVERY: Duration = Duration::from_secs(3_600);

/// Renews whenever it is time, in every clone of the agent's client. Never returns.
pub(crate) async fn run(mut agent: Agent) {
    loop {
        agent.credential = renewed(&agent).await;
    }
}

/// Returns once a renewed credential is on disk.
pub(crate) async fn once(agent: &Agent) {
    renewed(agent).await;
}

async fn renewed(agent: &Agent) -> Credential {
    let renew_at = agent.credential.facts().renew_at();
    loop {
        let wait = renew_at.duration_since(SystemTime::now()).unwrap_or_default();
        if !wait.is_zero() {
            tokio::time::sleep(wait.min(LOOK_EVERY)).await;
            continue;
        }
        match renew(agent).await {
            Ok(credential) => {
                tracing::info!("the certificate is renewed");
                return credential;
            }
            Err(error) => {
                tracing::warn!(%error, "the certificate could not be renewed; trying again");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

async fn renew(agent: &Agent) -> Result<Credential, Failure> {
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let key = PrivateKey::generate().map_err(|e| host(&e))?;
    let csr_pem = key.signing_request().map_err(|e| host(&e))?;
    let renewed: Answer<Renewed> = agent.client.post("/v1/agent/renew", &Renew { csr_pem }).await?;
    let credential = Credential::new(key, &renewed.item.certificate_pem).map_err(|e| host(&e))?;
    agent.keep(&credential)?;
    agent.client.renew(&agent.ca, &credential)?;
    Ok(credential)
}

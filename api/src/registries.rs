//! Asking a private registry which image a tag names, with the credential that is kept: whoever deploys needs no login
//! of their own and is shown none. How registries are spoken to is not this crate's.

use crate::problem::Refusal;
use crate::sealing::open_credential;
use crate::service::Service;
use futures::future::BoxFuture;
use holdfast_model::delivery::ClearCredential;
use holdfast_model::resource::Image;
use holdfast_model::sealed::RegistryHost;
use holdfast_model::{AppId, Code, OrgId};
use holdfast_store::View;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Registries that a member asks at the same time, at most.
const ASKED_AT_ONCE_MAX: usize = 8;
/// For a registry to answer: less than a client waits for one attempt.
const ANSWER_MS_MAX: u64 = 8_000;

/// Speaks to registries.
pub trait Registries: Send + Sync + 'static {
    /// The image that `reference` names now, asked for with a credential; or a sentence for whoever asked.
    fn resolve(
        &self,
        reference: String,
        credential: ClearCredential,
    ) -> BoxFuture<'static, Result<Image, String>>;
}

/// The registries that a member asks, and how many it may ask at once.
pub struct Inquiries {
    registries: Arc<dyn Registries>,
    places: Semaphore,
}

impl Inquiries {
    /// Asks through `registries`.
    pub fn new(registries: Arc<dyn Registries>) -> Self {
        Self { registries, places: Semaphore::new(ASKED_AT_ONCE_MAX) }
    }
}

/// Asks a registry for which the app or its org has a credential, and no other: a member asks nobody whom no holder of
/// secrets named.
pub(crate) async fn resolve(
    service: &Service,
    view: View,
    owner: (AppId, OrgId),
    reference: String,
) -> Result<Image, Refusal> {
    let inquiries = service.registries.as_ref().ok_or_else(|| {
        Refusal::new(Code::Unavailable, "This member asks no registries: name the image by its digest.")
    })?;
    let unnamed = || Refusal::invalid("An image is named as in `registry.example/team/shop:v1`.");
    let host = RegistryHost::of_repository(&reference).ok_or_else(unnamed)?;
    let credential = open_credential(service, &view, owner, &host)?;
    let credential = credential.ok_or_else(|| Refusal::not_found("registry credential"))?;
    drop(view);
    let _place = inquiries.places.try_acquire().map_err(|_| {
        Refusal::new(Code::RateLimited, "This member asks many registries already; try again in a moment.")
    })?;
    tracing::info!(%host, app = %owner.0, "a registry is asked with the credential that is kept");
    match timeout(Duration::from_millis(ANSWER_MS_MAX), inquiries.registries.resolve(reference, credential))
        .await
    {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(why)) => Err(Refusal::new(Code::FailedPrecondition, why)),
        Err(_) => {
            let detail = format!("The registry {host} did not answer in time; try again, or name a digest.");
            Err(Refusal::new(Code::Timeout, detail))
        }
    }
}

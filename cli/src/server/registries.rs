//! How a member asks private registries which image a tag names.

use crate::commands::image::{image_of, sentence};
use crate::failure::{Failure, with_sources};
use futures::FutureExt;
use futures::future::BoxFuture;
use holdfast_api::registries::Registries;
use holdfast_model::delivery::ClearCredential;
use holdfast_model::resource::Image;
use holdfast_node::image::{ImageRef, Limits, Login, ReferenceError, RegistryClient};
use std::sync::Arc;

/// Speaks HTTPS to registries, and to those of this machine's loopback only where its operator allows it: what a tenant
/// names must not lead to what listens for the member alone.
pub(super) struct Asker {
    client: Arc<RegistryClient>,
    loopback: bool,
}

impl Asker {
    pub(super) fn new(loopback: bool) -> Result<Self, Failure> {
        let client = RegistryClient::new(Limits::default());
        let client = client.map_err(|e| Failure::Host(sentence(&with_sources(&e))))?;
        Ok(Self { client: Arc::new(client), loopback })
    }
}

impl Registries for Asker {
    fn resolve(
        &self,
        reference: String,
        credential: ClearCredential,
    ) -> BoxFuture<'static, Result<Image, String>> {
        let (client, loopback) = (Arc::clone(&self.client), self.loopback);
        async move {
            let parsed: ImageRef =
                reference.parse().map_err(|e: ReferenceError| sentence(&with_sources(&e)))?;
            if parsed.is_on_loopback() && !loopback {
                return Err(
                    "A member asks no registry on its own machine; name the image by its digest.".into()
                );
            }
            let login = Login::new(credential.user.reveal(), credential.password.reveal());
            let resolved = client.resolve(&parsed.with_login(Some(login))).await;
            let resolved = resolved.map_err(|e| {
                format!("Cannot resolve the image {reference}: {}", sentence(&with_sources(&e)))
            })?;
            Ok(image_of(&resolved))
        }
        .boxed()
    }
}

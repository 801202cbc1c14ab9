//! From an image reference to a digest, once, when a release is made.

use crate::failure::{Failure, with_sources};
use crate::session::Session;
use holdfast_model::AppId;
use holdfast_model::api::ResolveImage;
use holdfast_model::resource::{Image, ImageDigest};
use holdfast_node::image::{ImageError, ImageRef, Limits, RegistryClient, RegistryError, ResolvedImage};

/// Asks the registry which image `reference` names now. Of a private one a member asks, with the credential that is
/// kept for the app or its org: whoever deploys is not shown it.
pub(crate) async fn resolve(session: &Session, app: AppId, reference: &str) -> Result<Image, Failure> {
    let parsed: ImageRef = reference
        .parse()
        .map_err(|e| Failure::Usage(sentence(&with_sources(&e as &dyn std::error::Error))))?;
    let registry =
        RegistryClient::new(Limits::default()).map_err(|e| Failure::Host(sentence(&with_sources(&e))))?;
    let error = match registry.resolve(&parsed).await {
        Ok(resolved) => return Ok(image_of(&resolved)),
        Err(error) => error,
    };
    let refused =
        Failure::Host(format!("Cannot resolve the image {reference}: {}", sentence(&with_sources(&error))));
    if !asks_for_login(&error) {
        return Err(refused);
    }
    match session.client.resolve_image(app, &ResolveImage { reference: reference.to_owned() }).await {
        Ok(answer) => Ok(answer.item),
        // No credential is kept for it: the registry's own word says more.
        Err(error) if error.code() == "not_found" => Err(refused),
        Err(error) => Err(error.into()),
    }
}

fn asks_for_login(error: &ImageError) -> bool {
    matches!(error, ImageError::Registry(RegistryError::Denied { .. } | RegistryError::Token { .. }))
}

/// What a release keeps of it.
pub(crate) fn image_of(resolved: &ResolvedImage) -> Image {
    let reference = &resolved.reference;
    Image {
        repository: format!("{}/{}", reference.host(), reference.repository()),
        digest: ImageDigest::from_bytes(*resolved.digest.as_bytes()),
    }
}

/// The text with a full stop.
pub(crate) fn sentence(text: &str) -> String {
    format!("{}.", text.trim_end_matches('.'))
}

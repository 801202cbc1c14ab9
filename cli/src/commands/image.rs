//! From an image reference to a digest, once, when a release is made.

use crate::failure::{Failure, with_sources};
use holdfast_model::resource::{Image, ImageDigest};
use holdfast_node::image::{ImageRef, Limits, RegistryClient};

/// Asks the registry which image `reference` names now.
pub(crate) async fn resolve(reference: &str) -> Result<Image, Failure> {
    let parsed: ImageRef = reference
        .parse()
        .map_err(|e| Failure::Usage(sentence(&with_sources(&e as &dyn std::error::Error))))?;
    let registry =
        RegistryClient::new(Limits::default()).map_err(|e| Failure::Host(sentence(&with_sources(&e))))?;
    let resolved = registry.resolve(&parsed).await;
    let resolved = resolved.map_err(|e| {
        Failure::Host(format!("Cannot resolve the image {reference}: {}", sentence(&with_sources(&e))))
    })?;
    Ok(Image {
        repository: format!("{}/{}", parsed.host(), parsed.repository()),
        digest: ImageDigest::from_bytes(*resolved.digest.as_bytes()),
    })
}

/// The text with a full stop.
fn sentence(text: &str) -> String {
    format!("{}.", text.trim_end_matches('.'))
}

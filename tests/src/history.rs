//! What the history of a cluster says, read as a client reads it.

use holdfast_client::{Client, ClientError};
use holdfast_model::{AppId, EventPayload, Revision};
use std::collections::BTreeMap;

/// Events of one page.
const PAGE: usize = 200;

/// Why the history could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// A page was not answered.
    #[error("the history could not be read")]
    Client(#[from] ClientError),
    /// An event is missing, or comes twice (I1).
    #[error("event {found} comes where {expected} was expected")]
    Gap {
        /// Which should come.
        expected: Revision,
        /// Which does.
        found: Revision,
    },
    /// A page does not say where the next begins.
    #[error("«{0}» is not where a page begins")]
    Cursor(String),
}

/// Every app that the history says was made, by name.
///
/// # Errors
/// When the history cannot be read, or has a gap.
pub async fn apps_created(client: &Client) -> Result<BTreeMap<String, Vec<AppId>>, HistoryError> {
    let mut made: BTreeMap<String, Vec<AppId>> = BTreeMap::new();
    let mut after = Revision(0);
    loop {
        let page = client.events(after, PAGE).await?;
        let mut last = after;
        for event in &page.items {
            let (expected, found) = (last.next(), event.revision);
            if found != expected {
                return Err(HistoryError::Gap { expected, found });
            }
            last = found;
            if let EventPayload::AppCreated(app) = &event.payload {
                made.entry(app.name.to_string()).or_default().push(app.id);
            }
        }
        let Some(next) = page.next else { return Ok(made) };
        after = next.parse().map_err(|_| HistoryError::Cursor(next))?;
    }
}

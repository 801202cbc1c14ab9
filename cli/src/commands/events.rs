//! `holdfast events`: the one history of the cluster, oldest first.

use crate::args::tenant::Events;
use crate::failure::Failure;
use crate::output::time;
use crate::session::Session;
use holdfast_model::limits::PAGE_MAX;
use holdfast_model::{Aggregate, Event, Revision};
use std::time::Duration;

/// Between two streams, when one breaks.
const REOPEN_AFTER: Duration = Duration::from_millis(300);

pub(crate) async fn run(session: &Session, arguments: Events) -> Result<(), Failure> {
    let mut after = match arguments.after {
        Some(revision) => Revision(revision),
        None => {
            let now = session.client.events(Revision(0), 1).await?.revision;
            Revision(now.0.saturating_sub(arguments.limit as u64))
        }
    };
    if arguments.follow {
        return follow(session, after).await;
    }
    let mut left = arguments.limit;
    while left > 0 {
        let page = session.client.events(after, left.min(PAGE_MAX)).await?;
        left = left.saturating_sub(page.items.len());
        for event in &page.items {
            session.output.line(event, || line(event))?;
        }
        // A page may be empty and still not be the last: it holds only what the login may see.
        let Some(next) = page.next.and_then(|next| next.parse().ok()) else { return Ok(()) };
        after = next;
    }
    Ok(())
}

/// Prints events as they happen, over breaks and changes of leader, each once.
async fn follow(session: &Session, mut after: Revision) -> Result<(), Failure> {
    loop {
        let broke = match session.client.follow_events(after).await {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Ok(Some(event)) => {
                        after = event.revision;
                        session.output.line(&event, || line(&event))?;
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            },
            Err(error) => Some(error),
        };
        match broke {
            Some(error) if !error.is_retryable() => return Err(error.into()),
            Some(error) => tracing::info!(%error, "the stream broke; opening another"),
            None => {}
        }
        tokio::time::sleep(REOPEN_AFTER).await;
    }
}

pub(crate) fn line(event: &Event) -> String {
    format!(
        "{:>8}  {}  {:<26}  {}  by {}{}{}",
        event.revision,
        time(event.time),
        event.payload.kind(),
        about(&event.aggregate),
        event.actor,
        event.source.map(|a| format!(" from {a}")).unwrap_or_default(),
        event.correlation.map(|d| format!("  for {d}")).unwrap_or_default(),
    )
}

pub(crate) fn about(aggregate: &Aggregate) -> String {
    match aggregate {
        Aggregate::Cluster(id) => id.to_string(),
        Aggregate::Org(id) => id.to_string(),
        Aggregate::App(id) => id.to_string(),
        Aggregate::Env(id) => id.to_string(),
        Aggregate::Release(id) => id.to_string(),
        Aggregate::Deployment(id) => id.to_string(),
        Aggregate::Instance(id) => id.to_string(),
        Aggregate::Route(id) => id.to_string(),
        Aggregate::Node(id) => id.to_string(),
        Aggregate::Edge(id) => id.to_string(),
        Aggregate::Member(id) => format!("member {id}"),
        Aggregate::Token(id) => id.to_string(),
        Aggregate::Enrolment(id) => id.to_string(),
        Aggregate::ExecGrant(id) => id.to_string(),
        Aggregate::Volume(id) => id.to_string(),
        Aggregate::Snapshot(id) => id.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::resource::Org;
    use holdfast_model::{Actor, Digest, EventPayload, OrgId, RequestId, Timestamp, TokenId};

    #[test]
    fn golden_line() {
        let org = Org {
            id: OrgId::from_bits(7),
            name: "acme".parse().unwrap(),
            version: 1,
            created_at: Timestamp(0),
        };
        let event = Event {
            revision: Revision(42),
            time: Timestamp(1_700_000_000_123),
            version: 1,
            aggregate: Aggregate::Org(org.id),
            aggregate_seq: 1,
            actor: Actor::Operator(TokenId::from_bits(1)),
            source: Some([192, 0, 2, 7].into()),
            org: Some(org.id),
            request_id: RequestId::from_bits(1),
            idempotency_key: None,
            correlation: None,
            causation: None,
            payload: EventPayload::OrgCreated(org),
            chain: Digest::default(),
        };
        assert_eq!(
            line(&event),
            "      42  2023-11-14T22:13:20.123Z  org_created                 \
             org_00000000000000000000000007  by operator tok_00000000000000000000000001 from 192.0.2.7"
        );
    }
}

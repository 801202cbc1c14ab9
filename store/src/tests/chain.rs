//! Following the chain of an exported history: what was written is right, and whatever was done to it is found.

use crate::{Chain, ChainError};
use holdfast_model::{Actor, Digest, Event, MemberId, Revision, Timestamp};

/// Every kind of event of a version, as JSON has it.
fn golden(version: &str) -> Vec<Event> {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(version).join("events.txt");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().skip(2).step_by(3).map(|json| serde_json::from_str(json).unwrap()).collect()
}

fn follow(events: &[Event]) -> Result<Chain, ChainError> {
    let mut chain = Chain::default();
    events.iter().try_for_each(|event| chain.follow(event))?;
    Ok(chain)
}

#[test]
fn i12_the_events_of_every_version_are_followed_as_json_has_them() {
    for version in ["v1", "v2", "v3"] {
        let events = golden(version);
        let last = events.last().unwrap();
        assert_eq!(follow(&events).unwrap(), Chain { revision: last.revision, digest: last.chain });
    }
}

#[test]
fn i12_an_event_that_was_changed_removed_added_or_moved_is_found() {
    let events = golden("v3");
    let middle = events.len() / 2;
    let broken = |change: &dyn Fn(&mut Vec<Event>)| {
        let mut changed = events.clone();
        change(&mut changed);
        follow(&changed).unwrap_err()
    };
    for at in [0, middle, events.len() - 1] {
        let revision = Revision(at as u64 + 1);
        let changes: [&dyn Fn(&mut Event); 5] = [
            &|event| event.time = Timestamp(event.time.0 + 1),
            &|event| event.actor = Actor::System(MemberId(99)),
            &|event| event.source = Some([192, 0, 2, 66].into()),
            &|event| event.payload = events[(at + 7) % events.len()].payload.clone(),
            &|event| event.chain = Digest([7; 32]),
        ];
        for change in changes {
            let error = broken(&|events| change(&mut events[at]));
            assert!(matches!(error, ChainError::Changed { revision: found } if found == revision), "{error}");
        }
    }
    assert!(matches!(broken(&|events| drop(events.remove(middle))), ChainError::NotNext { .. }));
    assert!(matches!(broken(&|events| events.swap(middle, middle + 1)), ChainError::NotNext { .. }));
    assert!(matches!(
        broken(&|events| events.insert(middle, events[middle].clone())),
        ChainError::NotNext { .. }
    ));
    // Numbered anew, so that no revision is missing.
    let error = broken(&|events| {
        events.remove(middle);
        (1..).zip(events).for_each(|(at, event)| event.revision = Revision(at));
    });
    assert!(
        matches!(error, ChainError::Changed { revision } if revision == Revision(middle as u64 + 1)),
        "{error}"
    );
    // The end of the revisions is no panic.
    let mut chain = Chain { revision: Revision(u64::MAX), digest: Digest::default() };
    assert!(matches!(chain.follow(&events[0]), Err(ChainError::NotNext { .. })));
}

//! Frames and items for the tests of this crate.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

pub mod member;

use std::collections::BTreeMap;

use holdfast_client::replica::{Applied, Published, Replica};
use holdfast_model::agent::{Backend, EdgeRoute, Followed, Frame, ProxyProtocol, Stamp};
use holdfast_model::{ClusterId, Incarnation, InstanceId, Revision, RouteId};

pub const CLUSTER: ClusterId = ClusterId::from_bits(7);

pub fn stamp(revision: u64) -> Stamp {
    stamp_in(1, revision)
}

pub fn stamp_in(incarnation: u64, revision: u64) -> Stamp {
    Stamp { cluster: CLUSTER, incarnation: Incarnation(incarnation), revision: Revision(revision) }
}

/// A route whose content says `mark`.
pub fn route(id: u64, mark: u16) -> EdgeRoute {
    EdgeRoute {
        id: RouteId::from_bits(id.into()),
        hostname: Some(format!("h{id}.example.com").parse().unwrap()),
        listen_port: mark,
        proxy_protocol: ProxyProtocol::Off,
        backends: vec![Backend {
            instance: InstanceId::from_bits(u128::from(id) + 1),
            address: "fd00::1".parse().unwrap(),
            port: mark,
            draining: false,
        }],
    }
}

pub fn key(id: u64) -> RouteId {
    RouteId::from_bits(id.into())
}

pub fn snapshot(stamp: Stamp, items: Vec<EdgeRoute>, confirmed_through: u64) -> Vec<Frame<EdgeRoute>> {
    let mut frames = vec![Frame::SnapshotBegin {
        stamp,
        items: items.len() as u64,
        confirmed_through: Revision(confirmed_through),
    }];
    frames.extend(items.chunks(3).map(|chunk| Frame::SnapshotItems(chunk.to_vec())));
    frames.push(Frame::SnapshotEnd);
    frames
}

pub fn delta(from: u64, to: u64, upserts: Vec<EdgeRoute>, removes: Vec<u64>) -> Frame<EdgeRoute> {
    let removes = removes.into_iter().map(key).collect();
    Frame::Delta { from: Revision(from), stamp: stamp(to), upserts, removes, confirmed_through: Revision(0) }
}

pub fn heartbeat(revision: u64, confirmed_through: u64) -> Frame<EdgeRoute> {
    Frame::Heartbeat { stamp: stamp(revision), confirmed_through: Revision(confirmed_through) }
}

pub fn feed(replica: &mut Replica<EdgeRoute>, frames: Vec<Frame<EdgeRoute>>) -> Applied {
    let mut last = None;
    for frame in frames {
        last = Some(replica.apply(frame).unwrap());
    }
    last.unwrap()
}

/// What a view holds, for comparing: the revision and each item's mark.
pub fn marks(view: &Published<EdgeRoute>) -> Option<(u64, BTreeMap<RouteId, u16>)> {
    view.as_ref().map(|view| {
        (view.stamp.revision.0, view.items.values().map(|item| (item.key(), item.listen_port)).collect())
    })
}

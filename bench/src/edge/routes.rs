//! A table of many routes: from the disk into force, one change of one route, look-ups.
//!
//! An edge's copy of its routes takes no more than [`ITEMS_MAX`]; of more than that the table alone is measured, made of routes
//! that are in memory.

use crate::Outcome;
use crate::peers::{cluster, fill, stamp};
use holdfast_client::Replica;
use holdfast_client::replica::ITEMS_MAX;
use holdfast_edge::agent::REPLICA_FILE;
use holdfast_edge::in_force::InForce;
use holdfast_edge::{Edge, EdgeConfig};
use holdfast_model::agent::{Backend, EdgeRoute, Frame, ProxyProtocol};
use holdfast_model::{Hostname, InstanceId, RouteId};
use std::hint::black_box;
use std::net::Ipv6Addr;
use std::path::Path;
use std::time::{Duration, Instant};

const PORT: u16 = 443;
/// Look-ups that are timed together; their names are drawn over the whole table.
const LOOK_UPS: u64 = 1_000_000;
/// A step through the table that meets every route and is never near the one before.
const STRIDE: u64 = 611_953;

fn hostname(nth: u64) -> String {
    format!("app-{nth}.tenant-{}.example", nth % 1_000)
}

fn route(nth: u64) -> Outcome<EdgeRoute> {
    let instance = InstanceId::from_bits(u128::from(nth));
    let address = Ipv6Addr::from((0xfd00_u128 << 112) | u128::from(nth));
    Ok(EdgeRoute {
        id: RouteId::from_bits(u128::from(nth)),
        hostname: Some(hostname(nth).parse()?),
        listen_port: PORT,
        proxy_protocol: ProxyProtocol::Off,
        backends: vec![Backend { instance, address, port: 8080, draining: false }],
    })
}

/// Measures and prints.
pub(crate) fn measure(folder: &Path, routes: u64, rounds: usize) -> Outcome<()> {
    std::fs::create_dir_all(folder)?;
    let measured = if routes <= ITEMS_MAX {
        measure_in(folder, routes, rounds)
    } else {
        measure_table(folder, routes, rounds)
    };
    std::fs::remove_dir_all(folder)?;
    measured
}

fn measure_in(folder: &Path, routes: u64, rounds: usize) -> Outcome<()> {
    let file = folder.join(REPLICA_FILE);
    fill(&file, (0..routes).map(route).collect::<Outcome<_>>()?)?;
    let names = names(routes)?;
    let (mut opens, mut tables, mut stores, mut switches, mut look_ups) =
        (vec![], vec![], vec![], vec![], vec![]);
    for (revision, round) in (1..).zip(0..rounds) {
        let began = Instant::now();
        let mut replica: Replica<EdgeRoute> = Replica::open(&file, cluster())?;
        opens.push(began.elapsed());
        let edge = Edge::new(&EdgeConfig::new(folder.to_owned()));
        let mut in_force = InForce::new(edge.clone());
        let began = Instant::now();
        in_force.put(replica.current());
        tables.push(began.elapsed());
        if edge.table().routes() as u64 != routes {
            return Err(format!("{} of {routes} routes are in force", edge.table().routes()).into());
        }

        look_ups.push(look_up(&edge, &names)?);
        let mut changed = route(round as u64)?;
        changed.backends[0].port = 9000 + u16::try_from(round)?;
        let (from, next) = (stamp(revision).revision, stamp(revision + 1));
        let delta = Frame::Delta {
            from,
            stamp: next,
            upserts: vec![changed],
            removes: Vec::new(),
            confirmed_through: next.revision,
        };
        replica.begin_stream();
        let began = Instant::now();
        replica.apply(delta)?;
        stores.push(began.elapsed());
        let began = Instant::now();
        in_force.put(replica.current());
        switches.push(began.elapsed());
        if replica.revision() != Some(next.revision) || edge.metrics().tables_applied.get() != 2 {
            return Err("the change was not put in force".into());
        }
    }
    print(
        routes,
        &[
            ("read and checked from the disk", &opens),
            ("made a table and put in force", &tables),
            ("a look-up", &look_ups),
            ("one change: stored on the disk", &stores),
            ("the same: made a table and put in force", &switches),
        ],
    );
    Ok(())
}

fn measure_table(folder: &Path, count: u64, rounds: usize) -> Outcome<()> {
    eprintln!("an edge's copy of its routes takes {ITEMS_MAX} at most: measuring the table alone");
    let mut routes: Vec<EdgeRoute> = (0..count).map(route).collect::<Outcome<_>>()?;
    let names = names(count)?;
    let (mut tables, mut switches, mut look_ups) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        let edge = Edge::new(&EdgeConfig::new(folder.to_owned()));
        let began = Instant::now();
        edge.apply(&routes)?;
        tables.push(began.elapsed());
        look_ups.push(look_up(&edge, &names)?);
        routes[0].backends[0].port = 9000 + u16::try_from(round)?;
        let began = Instant::now();
        edge.apply(&routes)?;
        switches.push(began.elapsed());
    }
    print(
        count,
        &[
            ("made a table and put in force", &tables),
            ("a look-up", &look_ups),
            ("one change: made a table and put in force", &switches),
        ],
    );
    Ok(())
}

/// Names all over the table, in no order that its memory has.
fn names(routes: u64) -> Outcome<Vec<Hostname>> {
    (0..LOOK_UPS).map(|nth| Ok(hostname(nth.wrapping_mul(STRIDE) % routes).parse()?)).collect()
}

/// Time of one look-up.
fn look_up(edge: &Edge, names: &[Hostname]) -> Outcome<Duration> {
    let began = Instant::now();
    let table = edge.table();
    let port = table.port(PORT).ok_or("the port has no routes")?;
    let found = names.iter().filter(|name| black_box(port.by_name(name)).is_some()).count();
    let each = began.elapsed() / u32::try_from(LOOK_UPS)?;
    if found as u64 == LOOK_UPS {
        Ok(each)
    } else {
        Err(format!("{found} of {LOOK_UPS} names were found").into())
    }
}

fn print(routes: u64, rows: &[(&str, &[Duration])]) {
    println!("| {routes} routes | median (least–greatest) |\n|---|---|");
    for (name, values) in rows {
        println!("| {name} | {} |", shown(values));
    }
}

fn shown(values: &[Duration]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort();
    let (least, greatest) = (sorted.first().copied(), sorted.last().copied());
    format!(
        "{:.3?} ({:.3?}–{:.3?})",
        sorted.get(sorted.len() / 2).copied().unwrap_or_default(),
        least.unwrap_or_default(),
        greatest.unwrap_or_default()
    )
}

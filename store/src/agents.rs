//! What each agent is to know: an edge its routes with their backends, a node its instances. Derived from a view at
//! one revision, so that a snapshot and the deltas after it agree (I6).

use crate::error::StoreError;
use crate::views::{Views, required};
use crate::volumes;
use holdfast_model::agent::{Backend, Desired, EdgeRoute, NodeInstance};
use holdfast_model::limits::DRAIN_GRACE_MS;
use holdfast_model::resource::{Instance, InstanceState, Release, Route, RouteTarget};
use holdfast_model::{Aggregate, EnvId, Event, EventPayload, InstanceId, NodeId, ReleaseId, RouteId};
use std::collections::BTreeMap;

/// Routes that are read at a time.
const ROUTES_PAGE: usize = 1_000;

/// Every edge's routes, by id.
///
/// # Errors
/// When the database fails.
pub fn edge_routes(view: &(impl Views + ?Sized)) -> Result<Vec<EdgeRoute>, StoreError> {
    let mut known = Known::default();
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let page = view.all_routes(after, ROUTES_PAGE)?;
        let Some(last) = page.last() else { return Ok(all) };
        after = Some(last.id);
        for route in page {
            all.push(known.edge_route(view, route)?);
        }
    }
}

/// One route, as an edge is to know it.
///
/// # Errors
/// When the database fails.
pub fn edge_route(view: &(impl Views + ?Sized), id: RouteId) -> Result<Option<EdgeRoute>, StoreError> {
    view.route(id)?.map(|route| Known::default().edge_route(view, route)).transpose()
}

/// The instances that a node is to run or to drain, by id.
///
/// # Errors
/// When the database fails.
pub fn node_instances(view: &(impl Views + ?Sized), node: NodeId) -> Result<Vec<NodeInstance>, StoreError> {
    let mut known = Known::default();
    view.node_instances_live(node)?.into_iter().map(|i| known.node_instance(view, i)).collect()
}

/// One instance, as its node is to know it; `None` when it has ended or never was.
///
/// # Errors
/// When the database fails.
pub fn node_instance(
    view: &(impl Views + ?Sized),
    id: InstanceId,
) -> Result<Option<NodeInstance>, StoreError> {
    let live = view.instance(id)?.filter(|i| !i.state.is_final());
    live.map(|i| Known::default().node_instance(view, i)).transpose()
}

/// What was read already for other items of the same list.
#[derive(Default)]
struct Known {
    releases: BTreeMap<ReleaseId, Release>,
    /// Instances that serve, by env.
    serving: BTreeMap<EnvId, Vec<Instance>>,
}

impl Known {
    fn release(&mut self, view: &(impl Views + ?Sized), id: ReleaseId) -> Result<Release, StoreError> {
        if let Some(release) = self.releases.get(&id) {
            return Ok(release.clone());
        }
        let release = required(view.release(id)?, "a release")?;
        self.releases.insert(id, release.clone());
        Ok(release)
    }

    fn serving(&mut self, view: &(impl Views + ?Sized), env: EnvId) -> Result<Vec<Instance>, StoreError> {
        if let Some(serving) = self.serving.get(&env) {
            return Ok(serving.clone());
        }
        let mut serving = view.live_instances(env)?;
        // A draining instance still finishes its connections, unless it never had any.
        serving.retain(|i| {
            i.state == InstanceState::Ready || (i.state == InstanceState::Draining && i.was_ready)
        });
        self.serving.insert(env, serving.clone());
        Ok(serving)
    }

    fn edge_route(&mut self, view: &(impl Views + ?Sized), route: Route) -> Result<EdgeRoute, StoreError> {
        let mut backends = Vec::new();
        for instance in self.serving(view, route.env)? {
            if instance.process != route.process {
                continue;
            }
            // Its own release says which port it listens on; an older one may not have the port yet.
            let release = self.release(view, instance.release)?;
            let process = release.manifest.processes.get(&route.process);
            let port = process.and_then(|p| p.ports.iter().find(|port| port.name == route.port));
            let Some(port) = port else { continue };
            backends.push(Backend {
                instance: instance.id,
                address: instance.address,
                port: port.internal,
                draining: instance.state == InstanceState::Draining,
            });
        }
        let hostname = match route.target {
            RouteTarget::TlsPassthrough { hostname } => Some(hostname),
            RouteTarget::Tcp => None,
        };
        Ok(EdgeRoute {
            id: route.id,
            hostname,
            listen_port: route.listen_port,
            proxy_protocol: route.proxy_protocol,
            backends,
        })
    }

    fn node_instance(
        &mut self,
        view: &(impl Views + ?Sized),
        instance: Instance,
    ) -> Result<NodeInstance, StoreError> {
        let release = self.release(view, instance.release)?;
        let process = required(release.manifest.processes.get(&instance.process), "a process of a release")?;
        let volumes = volumes::of_node_instance(view, &instance, process)?;
        let desired = match instance.state {
            InstanceState::Draining => Desired::Drain { grace_ms: DRAIN_GRACE_MS },
            _ => Desired::Run,
        };
        Ok(NodeInstance {
            id: instance.id,
            org: required(view.org(instance.org)?, "an org")?.name,
            app: required(view.app(instance.app)?, "an app")?.name,
            env: required(view.env(instance.env)?, "an env")?.name,
            process: instance.process,
            image: release.image.clone(),
            command: process.command.clone(),
            workdir: process.workdir.clone(),
            user: process.user.clone(),
            vars: process.vars.clone(),
            resources: process.resources,
            ports: process.ports.clone(),
            health: process.health.clone(),
            restart: process.restart.clone(),
            address: instance.address,
            desired,
            volumes,
        })
    }
}

/// Whom an event may concern. Errs on the side of more: who is named looks whether anything of its own changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// What edges know may have changed.
    pub edges: bool,
    /// Which nodes' instances may have changed.
    pub nodes: TouchedNodes,
}

/// Which nodes an event may concern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TouchedNodes {
    /// None.
    None,
    /// One.
    One(NodeId),
    /// Any.
    All,
}

/// Whom an event may concern, at the price of one read at most. `view` is at the event's revision or later.
///
/// # Errors
/// When the database fails.
pub fn touches(event: &Event, view: &(impl Views + ?Sized)) -> Result<Touched, StoreError> {
    let touched = |edges, nodes| Ok(Touched { edges, nodes });
    match &event.payload {
        EventPayload::RouteCreated(_) | EventPayload::RouteDeleted { .. } => {
            touched(true, TouchedNodes::None)
        }
        EventPayload::AppDeleted { .. } => touched(true, TouchedNodes::All),
        EventPayload::InstancePlaced(instance) => touched(false, TouchedNodes::One(instance.node)),
        EventPayload::InstanceStateChanged { instance, .. } => {
            // An instance that is already forgotten may have been anywhere.
            let node = view.instance(*instance)?.map_or(TouchedNodes::All, |i| TouchedNodes::One(i.node));
            touched(true, node)
        }
        EventPayload::RemovalsConfirmed { .. } => match event.aggregate {
            Aggregate::Node(node) => touched(false, TouchedNodes::One(node)),
            _ => touched(true, TouchedNodes::None),
        },
        _ => touched(false, TouchedNodes::None),
    }
}

//! States with a long history, made without a cluster: real commands through the real [`Store::apply`], as fast as one
//! process can, so that a million events or instances take a minute and not an hour.
//!
//! Time and ids are counted, never drawn: the same call makes the same state, byte for byte. Nothing here is synced
//! before [`fill`] returns.

use holdfast_model::agent::{Observation, ProxyProtocol};
use holdfast_model::command::{Joiner, NewMember, NewToken};
use holdfast_model::resource::{
    Capacity, Enrolled, EnrolmentKind, Image, ImageDigest, InstanceState, RouteTarget, TokenKind,
};
use holdfast_model::{
    Actor, AppId, ClusterId, Command, Context, Digest, EnvId, Incarnation, LogIndex, Manifest, MemberId,
    NodeId, OrgId, Output, Proposal, ReleaseId, RequestId, Scope, Timestamp, TokenId, limits, manifest,
};
use holdfast_store::{Store, StoreError, Views};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};

/// Commands of one transaction, as a busy cluster has them.
const BATCH: usize = 512;
/// Commands of one entry of the log.
const ENTRY: usize = 16;
/// Nodes that instances are spread over.
const NODES: usize = 24;
/// Apps of one org.
const APPS_PER_ORG: usize = 500;
/// Instances whose nodes report them in one command.
const REPORTED: usize = 64;
/// Batches between two checkpoints, so that a fill leaves no more unsynced than a member would.
const CHECKPOINT_BATCHES: u64 = 64;
/// When the first command was asked for, in milliseconds since 1970, if the state is a new one.
const BEGIN_MS: u64 = 1_790_000_000_000;

/// Why a state could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The store failed.
    #[error("the state could not be written")]
    Store(#[from] StoreError),
    /// A command had another outcome than it must.
    #[error("{what} was answered with {answer}; the generator no longer fits the product's rules")]
    Answer {
        /// Which command.
        what: &'static str,
        /// The outcome.
        answer: String,
    },
    /// Nobody waits for the state any more.
    #[error("it was stopped before the state was whole; make it again from nothing")]
    Stopped,
    /// A constant of the generator is no longer accepted.
    #[error("the generator's own {what} is refused: {why}")]
    Own {
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
}

/// What a history is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Apps and nothing else: what the write benchmark makes.
    Apps,
    /// Envs that were deployed once and run: an app, env, release, deployment, route, and so many instances each that were placed and
    /// got ready.
    Tenants {
        /// Instances of each env.
        instances: u32,
    },
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// At least so many events in all.
    Events(u64),
    /// At least so many live instances made by this call.
    Instances(u64),
}

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Events in the state.
    pub events: u64,
    /// Instances that were placed.
    pub instances: u64,
    /// The last log index that was applied.
    pub last_index: u64,
}

fn own<T, E: Display>(what: &'static str, value: Result<T, E>) -> Result<T, FillError> {
    value.map_err(|e| FillError::Own { what, why: e.to_string() })
}

struct Filler<'a> {
    store: &'a Store,
    meta: &'a dyn Fn(LogIndex) -> Vec<u8>,
    stop: &'a AtomicBool,
    operator: TokenId,
    next: LogIndex,
    drawn: u64,
    batches: u64,
}

impl Filler<'_> {
    fn proposal(&mut self, actor: Actor, key: Option<String>, command: Command) -> Proposal {
        self.drawn += 1;
        let drawn = u128::from(self.drawn);
        let context = Context {
            actor,
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(drawn),
            idempotency_key: key,
            // A thousand commands in a second.
            now: Timestamp(BEGIN_MS + self.drawn),
            entropy: drawn << 64,
        };
        Proposal { context, command }
    }

    /// Applies commands of one actor. Those with a key are kept for repeats, as a client's are.
    fn apply(
        &mut self,
        what: &'static str,
        actor: impl Fn(usize) -> Actor,
        keyed: bool,
        commands: Vec<Command>,
    ) -> Result<Vec<Output>, FillError> {
        let mut outputs = Vec::with_capacity(commands.len());
        let mut commands = commands.into_iter().enumerate().peekable();
        while commands.peek().is_some() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(FillError::Stopped);
            }
            let mut entries: Vec<Vec<Proposal>> = Vec::with_capacity(BATCH.div_ceil(ENTRY));
            for (n, (place, command)) in commands.by_ref().take(BATCH).enumerate() {
                if n % ENTRY == 0 {
                    entries.push(Vec::with_capacity(ENTRY));
                }
                let key = keyed.then(|| format!("{what}-{:026}", self.drawn));
                let proposal = self.proposal(actor(place), key, command);
                if let Some(entry) = entries.last_mut() {
                    entry.push(proposal);
                }
            }
            let last = LogIndex(self.next.0 + entries.len() as u64 - 1);
            for outcome in self.store.apply(self.next, &entries, &(self.meta)(last))?.into_iter().flatten() {
                match outcome {
                    Ok(accepted) => outputs.push(accepted.output),
                    Err(rejection) => {
                        return Err(FillError::Answer { what, answer: format!("{rejection:?}") });
                    }
                }
            }
            self.next = last.next();
            self.batches += 1;
            if self.batches.is_multiple_of(CHECKPOINT_BATCHES) {
                self.store.checkpoint()?;
            }
        }
        Ok(outputs)
    }

    fn ask(&mut self, what: &'static str, commands: Vec<Command>) -> Result<Vec<Output>, FillError> {
        let operator = Actor::Operator(self.operator);
        self.apply(what, |_| operator, true, commands)
    }

    fn org(&mut self, n: u64) -> Result<OrgId, FillError> {
        let name = own("org name", format!("fill-{n:08}").parse())?;
        match self.ask("an org", vec![Command::CreateOrg { name }])?.as_slice() {
            [Output::Org(org)] => Ok(*org),
            other => Err(FillError::Answer { what: "an org", answer: format!("{other:?}") }),
        }
    }

    fn nodes(&mut self) -> Result<(), FillError> {
        for n in 0..NODES {
            let digest = Digest::of(&(self.drawn + 1).to_be_bytes());
            let create = Command::CreateEnrolment { kind: EnrolmentKind::Node, digest, ttl_ms: 60_000 };
            let made = self.ask("an enrolment", vec![create])?;
            let [Output::Enrolment(id)] = made.as_slice() else {
                return Err(FillError::Answer { what: "an enrolment", answer: format!("{made:?}") });
            };
            let actor = Actor::Enrolling(*id);
            let name = own("node name", format!("fill-{n:04}").parse())?;
            // Room for everything that comes.
            let capacity = Capacity { memory_mib: 1 << 40, cpu_milli: 1 << 40 };
            let joiner = Joiner::Node { name, capacity };
            let join = Command::Enrol { digest, key: Digest([9; 32]), joiner };
            let joined = self.apply("a node", |_| actor, false, vec![join])?;
            if !matches!(joined.as_slice(), [Output::Enrolled(Enrolled::Node(_))]) {
                return Err(FillError::Answer { what: "a node", answer: format!("{joined:?}") });
            }
        }
        Ok(())
    }

    fn apps(&mut self, org: OrgId, first: u64, count: usize) -> Result<Vec<AppId>, FillError> {
        let name = |n: u64| own("app name", app_name(n).parse());
        let commands: Result<Vec<_>, _> = (first..)
            .take(count)
            .map(|n| Ok::<_, FillError>(Command::CreateApp { org, name: name(n)? }))
            .collect();
        self.ask("an app", commands?)?
            .into_iter()
            .map(|output| match output {
                Output::App(app) => Ok(app),
                other => Err(FillError::Answer { what: "an app", answer: format!("{other:?}") }),
            })
            .collect()
    }

    /// An env of each app, deployed, its instances ready. Answers with how many instances that were.
    fn deployed(&mut self, apps: &[AppId], first: u64, instances: u32) -> Result<u64, FillError> {
        let env_name: holdfast_model::EnvName = own("env name", "production".parse())?;
        let create = apps.iter().map(|app| Command::CreateEnv { app: *app, name: env_name.clone() });
        let envs = self.ask("an env", create.collect())?;
        let envs: Vec<EnvId> = envs
            .into_iter()
            .filter_map(|o| if let Output::Env(env) = o { Some(env) } else { None })
            .collect();
        let image = |n: u64| Image {
            repository: "registry.example/team/service".into(),
            digest: ImageDigest::from_bytes(Digest::of(&n.to_be_bytes()).0),
        };
        let drawn = self.drawn;
        let release = |(n, env): (u64, &EnvId)| {
            Ok(Command::CreateRelease {
                env: *env,
                image: image(drawn + n),
                manifest: manifest_of(&app_name(first + n))?,
            })
        };
        let creates: Result<Vec<_>, FillError> = (0..).zip(&envs).map(release).collect();
        let releases = self.ask("a release", creates?)?;
        let releases: Vec<ReleaseId> = releases
            .into_iter()
            .filter_map(|o| if let Output::Release(release) = o { Some(release) } else { None })
            .collect();
        let process: holdfast_model::ProcessName = own("process name", "web".parse())?;
        let counts = BTreeMap::from([(process.clone(), instances)]);
        let deploy = envs.iter().zip(&releases).map(|(env, release)| Command::Deploy {
            env: *env,
            release: *release,
            counts: counts.clone(),
        });
        self.ask("a deployment", deploy.collect())?;
        let port: holdfast_model::PortName = own("port name", "https".parse())?;
        let mut routes = Vec::with_capacity(envs.len());
        for (n, env) in (0_u64..).zip(&envs) {
            let hostname = own("hostname", format!("h{:020}.example.com", mixed(drawn + n)).parse())?;
            routes.push(Command::CreateRoute {
                env: *env,
                target: RouteTarget::TlsPassthrough { hostname },
                listen_port: 443,
                process: process.clone(),
                port: port.clone(),
                proxy_protocol: ProxyProtocol::Off,
            });
        }
        self.ask("a route", routes)?;
        let mut seen: BTreeMap<NodeId, Vec<Observation>> = BTreeMap::new();
        let mut placed = 0;
        let view = self.store.view()?;
        for env in &envs {
            for instance in view.live_instances(*env)? {
                placed += 1;
                seen.entry(instance.node).or_default().push(Observation {
                    instance: instance.id,
                    state: InstanceState::Ready,
                    reason: None,
                    detail: None,
                    restarts: 0,
                });
            }
        }
        drop(view);
        let (mut nodes, mut reports) = (Vec::new(), Vec::new());
        for (node, observations) in seen {
            for observations in observations.chunks(REPORTED) {
                nodes.push(node);
                reports.push(Command::ReportInstances { node, observations: observations.to_vec() });
            }
        }
        self.apply("a report", |place| Actor::Node(nodes[place]), false, reports)?;
        Ok(placed)
    }
}

/// As long as a name may be.
fn app_name(n: u64) -> String {
    format!("fill-{:026}", mixed(n))
}

fn manifest_of(app: &str) -> Result<Manifest, FillError> {
    let text = format!(
        "schema_version = \"v1\"\n[app]\nname = \"{app}\"\n[processes.web]\n\
         resources = {{ memory = \"64Mi\", cpu = 0.1 }}\nscaling = {{ min = 1, max = 100 }}\n\
         ports = [{{ name = \"https\", internal = 8443, protocol = \"tcp\" }}]\n"
    );
    own("manifest", manifest::parse(&text).map_err(|e| format!("{e:?}")))
}

/// Spreads consecutive numbers over all numbers, the same way in every run: nobody gets sorted keys.
pub fn mixed(n: u64) -> u64 {
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn init() -> Result<Command, FillError> {
    Ok(Command::InitCluster {
        cluster: ClusterId::from_bits(7),
        incarnation: Incarnation(1),
        member: NewMember {
            name: own("member name", "m1".parse())?,
            raft_addr: "127.0.0.1:7444".into(),
            api_addr: "127.0.0.1:7443".into(),
        },
        operator: NewToken {
            name: own("token name", "operator".parse())?,
            digest: Digest([1; 32]),
            kind: TokenKind::Operator,
            scopes: Scope::ALL.iter().copied().collect(),
            ttl_ms: limits::TOKEN_MS_MAX,
        },
    })
}

/// Adds to a state until it has as much as is asked for, and makes it durable. A state without a cluster gets one.
/// `meta` is what is stored for Raft after the entry with an index; `stop` ends it early, from another thread.
///
/// # Errors
/// When the store fails, when a command is rejected, and when it was stopped.
pub fn fill(
    store: &Store,
    shape: Shape,
    until: Until,
    meta: &dyn Fn(LogIndex) -> Vec<u8>,
    stop: &AtomicBool,
) -> Result<Filled, FillError> {
    let next = store.applied().map_or(LogIndex(0), LogIndex::next);
    let drawn = store.revision().0 << 8;
    let mut filler = Filler { store, meta, stop, operator: TokenId::from_bits(0), next, drawn, batches: 0 };
    if store.view()?.cluster()?.is_none() {
        filler.apply("a cluster", |_| Actor::System(MemberId(1)), false, vec![init()?])?;
    }
    let first = store.view()?.tokens(None, None, 1)?.first().map(|token| token.id);
    filler.operator =
        first.ok_or_else(|| FillError::Own { what: "state", why: "it has no operator's token".into() })?;
    let mut filled = Filled::default();
    let (mut orgs, mut apps) = (0, 0);
    if matches!(shape, Shape::Tenants { .. }) {
        filler.nodes()?;
    }
    loop {
        filled.events = store.revision().0;
        let left = match until {
            Until::Events(events) => events.saturating_sub(filled.events),
            Until::Instances(instances) => instances.saturating_sub(filled.instances),
        };
        if left == 0 {
            break;
        }
        let org = filler.org(drawn + orgs)?;
        orgs += 1;
        let each = match (shape, until) {
            (Shape::Apps, _) => 1,
            (Shape::Tenants { instances }, Until::Events(_)) => 6 + 2 * u64::from(instances),
            (Shape::Tenants { instances }, Until::Instances(_)) => u64::from(instances.max(1)),
        };
        let count = APPS_PER_ORG.min(usize::try_from(left.div_ceil(each)).unwrap_or(APPS_PER_ORG));
        let made = filler.apps(org, drawn + apps, count)?;
        apps += count as u64;
        if let Shape::Tenants { instances } = shape {
            filled.instances += filler.deployed(&made, drawn + apps - count as u64, instances)?;
        }
    }
    store.checkpoint()?;
    filled.last_index = filler.next.0.saturating_sub(1);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fill_that_nobody_waits_for_ends() {
        let folder = std::env::temp_dir().join(format!("bench-stopped-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let store = Store::open(&folder.join("state.redb")).unwrap();
        let meta = |_: LogIndex| Vec::new();
        let made = fill(&store, Shape::Apps, Until::Events(u64::MAX), &meta, &AtomicBool::new(true));
        assert!(matches!(made, Err(FillError::Stopped)));
        drop(store);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_filled_state_is_sound_and_is_the_same_whenever_it_is_made() {
        let digests: Vec<_> = (0..2)
            .map(|_| {
                let folder = std::env::temp_dir().join(format!("bench-fill-{}", std::process::id()));
                std::fs::create_dir_all(&folder).unwrap();
                let path = folder.join("state.redb");
                let store = Store::open(&path).unwrap();
                let (meta, go) = (|_: LogIndex| Vec::new(), AtomicBool::new(false));
                let made =
                    fill(&store, Shape::Tenants { instances: 3 }, Until::Instances(30), &meta, &go).unwrap();
                assert_eq!(made.instances, 30);
                let more = fill(&store, Shape::Apps, Until::Events(made.events + 70), &meta, &go).unwrap();
                assert!(more.events >= made.events + 70);
                let verified = store.verify().unwrap();
                drop(store);
                std::fs::remove_dir_all(&folder).unwrap();
                verified
            })
            .collect();
        assert_eq!(digests[0], digests[1]);
    }
}

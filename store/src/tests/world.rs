//! A cluster of one store for tests: it draws contexts, applies commands one by one, and remembers the log.

use crate::rows::Rows;
use crate::tables::{Table, key};
use crate::{Store, View, Views};
use holdfast_model::agent::{Observation, ProxyProtocol};
use holdfast_model::command::{Joiner, NewCluster, NewMember, NewToken};
use holdfast_model::resource::{
    Capacity, Enrolled, EnrolmentKind, Image, ImageDigest, Instance, InstanceReason, InstanceState,
    RouteTarget, TokenKind,
};
use holdfast_model::*;
use std::collections::BTreeMap;

pub(super) const START: Timestamp = Timestamp(1_700_000_000_000);

pub(super) struct World {
    pub(super) store: Store,
    pub(super) now: Timestamp,
    pub(super) operator: TokenId,
    pub(super) log: Vec<Vec<Proposal>>,
    drawn: u128,
}

/// An org with an app, an env and a token that may do everything in it.
#[derive(Clone, Copy)]
pub(super) struct Tenant {
    pub(super) org: OrgId,
    pub(super) app: AppId,
    pub(super) env: EnvId,
    pub(super) token: TokenId,
}

pub(super) fn memory_store() -> Store {
    Store::open_with_backend(redb::backends::InMemoryBackend::new()).unwrap()
}

/// How many outcomes are kept; each is found by its end, and is there.
pub(super) fn kept_outcomes(store: &Store) -> usize {
    let writer = store.writer().unwrap();
    let ends = writer.scan(&key(Table::OutcomeEnd, &[]), None, usize::MAX).unwrap();
    for (end, _) in &ends {
        assert!(writer.get(&key(Table::Outcome, &[&end[9..]])).unwrap().is_some());
    }
    ends.len()
}

pub(super) fn counts(web: u32) -> BTreeMap<ProcessName, u32> {
    BTreeMap::from([("web".parse().unwrap(), web)])
}

pub(super) fn manifest(app: &str, more: &str) -> Manifest {
    let text = format!(
        "schema_version = \"v1\"\n[app]\nname = \"{app}\"\n[processes.web]\nresources = {{ memory = \"64Mi\", cpu = 0.5 }}\n\
         scaling = {{ min = 3, max = 50 }}\nports = [{{ name = \"https\", internal = 8443, protocol = \"tcp\" }}]\n{more}"
    );
    manifest::parse(&text).unwrap()
}

pub(super) fn image(n: u8) -> Image {
    Image { repository: "registry.test/app".into(), digest: ImageDigest::from_bytes([n; 32]) }
}

pub(super) fn token(digest: u8, kind: TokenKind, scopes: &[Scope]) -> NewToken {
    NewToken {
        name: "test".parse().unwrap(),
        digest: Digest([digest; 32]),
        kind,
        scopes: scopes.iter().copied().collect(),
        ttl_ms: limits::TOKEN_MS_MAX,
    }
}

pub(super) fn init() -> Command {
    Command::InitCluster {
        cluster: ClusterId::from_bits(7),
        incarnation: Incarnation(1),
        member: NewMember {
            name: "one".parse().unwrap(),
            raft_addr: "10.0.0.1:7444".into(),
            api_addr: "10.0.0.1:7443".into(),
        },
        operator: token(1, TokenKind::Operator, Scope::ALL),
    }
}

/// `init`, for a cluster that begins at this version.
pub(super) fn begin(version: ClusterVersion) -> Command {
    let Command::InitCluster { cluster, incarnation, member, operator } = init() else { unreachable!() };
    NewCluster { cluster, incarnation, member, operator }.at(version)
}

pub(super) fn route(env: EnvId, name: &str) -> Command {
    Command::CreateRoute {
        env,
        target: RouteTarget::TlsPassthrough { hostname: name.parse().unwrap() },
        listen_port: 443,
        process: "web".parse().unwrap(),
        port: "https".parse().unwrap(),
        proxy_protocol: ProxyProtocol::Off,
    }
}

pub(super) fn tcp_route(env: EnvId, port: u16) -> Command {
    Command::CreateRoute {
        env,
        target: RouteTarget::Tcp,
        listen_port: port,
        process: "web".parse().unwrap(),
        port: "https".parse().unwrap(),
        proxy_protocol: ProxyProtocol::Off,
    }
}

pub(super) fn seen(instance: InstanceId, state: InstanceState) -> Observation {
    let reason = (state == InstanceState::Failed).then_some(InstanceReason::HealthcheckFailed);
    Observation { instance, state, reason, detail: None, restarts: 0 }
}

pub(super) fn code(outcome: Outcome) -> Code {
    outcome.expect_err("this command must be rejected").code
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(memory_store())
    }

    pub(super) fn with(store: Store) -> Self {
        Self::beginning(store, ClusterVersion::NEWEST)
    }

    pub(super) fn at(version: ClusterVersion) -> Self {
        Self::beginning(memory_store(), version)
    }

    fn beginning(store: Store, version: ClusterVersion) -> Self {
        let operator = TokenId::from_bits(0);
        let mut world = Self { store, now: START, operator, log: Vec::new(), drawn: 0 };
        world.system(begin(version)).unwrap();
        let view = world.view();
        world.operator = view.token_by_digest(&Digest([1; 32])).unwrap().unwrap().id;
        world
    }

    pub(super) fn view(&self) -> View {
        self.store.view().unwrap()
    }

    pub(super) fn context(&mut self, actor: Actor, actor_org: Option<OrgId>) -> Context {
        self.drawn += 1;
        Context {
            actor,
            actor_org,
            source: None,
            request_id: RequestId::from_bits(self.drawn),
            idempotency_key: None,
            now: self.now,
            entropy: u128::MAX - self.drawn,
        }
    }

    pub(super) fn propose(&mut self, context: Context, command: Command) -> Outcome {
        let entry = vec![Proposal { context, command }];
        let index = LogIndex(self.log.len() as u64);
        self.log.push(entry.clone());
        let outcomes = self.store.apply(index, &[entry], &index.0.to_be_bytes()).unwrap();
        outcomes.into_iter().next().unwrap().remove(0)
    }

    pub(super) fn as_actor(&mut self, actor: Actor, org: Option<OrgId>, command: Command) -> Outcome {
        let context = self.context(actor, org);
        self.propose(context, command)
    }

    pub(super) fn operator(&mut self, command: Command) -> Outcome {
        self.as_actor(Actor::Operator(self.operator), None, command)
    }

    pub(super) fn system(&mut self, command: Command) -> Outcome {
        self.as_actor(Actor::System(MemberId(1)), None, command)
    }

    pub(super) fn tenant_asks(&mut self, tenant: &Tenant, command: Command) -> Outcome {
        self.as_actor(Actor::Token(tenant.token), Some(tenant.org), command)
    }

    /// Lets log time pass, as the clockwork says it.
    pub(super) fn log_time_passes(&mut self, ms: u64) {
        let mut left = ms;
        while left > 0 {
            let by_ms = left.min(limits::LOG_TIME_STEP_MS_MAX);
            self.system(Command::AdvanceLogTime { by_ms }).unwrap();
            left -= by_ms;
        }
    }

    /// Lets so much time pass that what is kept for `kept_ms` is over, whichever time it is kept by.
    pub(super) fn outlast(&mut self, kept_ms: u64) {
        self.now = self.now.plus_ms(kept_ms);
        if self.store.cluster_version().has_log_time() {
            self.log_time_passes(kept_ms + limits::LOG_TIME_STEP_MS_MAX);
        }
    }

    /// Lets time pass and ticks.
    pub(super) fn tick_after(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.system(Command::Tick).unwrap();
    }

    pub(super) fn tenant(&mut self, name: &str, digest: u8) -> Tenant {
        let Output::Org(org) =
            self.operator(Command::CreateOrg { name: name.parse().unwrap() }).unwrap().output
        else {
            panic!("no org")
        };
        let new = token(digest, TokenKind::Org(org), &Role::Owner.scopes().iter().collect::<Vec<_>>());
        let Output::Token(token) = self.operator(Command::CreateToken(new)).unwrap().output else {
            panic!("no token")
        };
        let app = Command::CreateApp { org, name: "hello".parse().unwrap() };
        let Output::App(app) = self.operator(app).unwrap().output else { panic!("no app") };
        let env = Command::CreateEnv { app, name: "prod".parse().unwrap() };
        let Output::Env(env) = self.operator(env).unwrap().output else { panic!("no env") };
        Tenant { org, app, env, token }
    }

    pub(super) fn node(&mut self, name: &str, memory_mib: u64) -> NodeId {
        self.drawn += 1;
        let digest = Digest::of(&self.drawn.to_be_bytes());
        let create = Command::CreateEnrolment { kind: EnrolmentKind::Node, digest, ttl_ms: 60_000 };
        let Output::Enrolment(id) = self.operator(create).unwrap().output else { panic!("no enrolment") };
        let capacity = Capacity { memory_mib, cpu_milli: 8_000 };
        let joiner = Joiner::Node { name: name.parse().unwrap(), capacity };
        let enrol = Command::Enrol { digest, key: Digest([9; 32]), joiner };
        let Output::Enrolled(Enrolled::Node(node)) =
            self.as_actor(Actor::Enrolling(id), None, enrol).unwrap().output
        else {
            panic!("no node")
        };
        node
    }

    pub(super) fn release(&mut self, tenant: &Tenant, n: u8) -> ReleaseId {
        let command =
            Command::CreateRelease { env: tenant.env, image: image(n), manifest: manifest("hello", "") };
        let Output::Release(id) = self.tenant_asks(tenant, command).unwrap().output else {
            panic!("no release")
        };
        id
    }

    pub(super) fn deploy(&mut self, tenant: &Tenant, release: ReleaseId) -> DeploymentId {
        let command = Command::Deploy { env: tenant.env, release, counts: BTreeMap::new() };
        let Output::Deployment(id) = self.tenant_asks(tenant, command).unwrap().output else {
            panic!("no deployment")
        };
        id
    }

    pub(super) fn live(&self, env: EnvId) -> Vec<Instance> {
        self.view().live_instances(env).unwrap()
    }

    /// The node of an instance reports it.
    pub(super) fn report(&mut self, instance: &Instance, state: InstanceState) {
        let command =
            Command::ReportInstances { node: instance.node, observations: vec![seen(instance.id, state)] };
        self.as_actor(Actor::Node(instance.node), None, command).unwrap();
    }

    /// Every booting instance gets ready and every draining one stops, until nothing moves.
    pub(super) fn settle(&mut self, env: EnvId) {
        for _ in 0..1_000 {
            let moving = |i: &&Instance| i.state != InstanceState::Ready;
            let Some(instance) = self.live(env).iter().find(moving).cloned() else { return };
            let next = if instance.state == InstanceState::Draining {
                InstanceState::Stopped
            } else {
                InstanceState::Ready
            };
            self.report(&instance, next);
        }
        panic!("the env never settles");
    }

    /// The parts of the invariants that hold after every step: rows, chain, numbering, replay (I1, I12, I13).
    pub(super) fn check(&self) {
        let verified = self.store.verify().unwrap();
        assert_eq!(verified.state, self.store.digest());
        let view = self.view();
        let mut seqs: BTreeMap<Aggregate, u64> = BTreeMap::new();
        let page = view.events(Revision(0), usize::MAX, None).unwrap();
        for (at, event) in (1..).zip(&page.events) {
            assert_eq!(event.revision, Revision(at));
            let seq = seqs.entry(event.aggregate).or_default();
            *seq += 1;
            assert_eq!(event.aggregate_seq, *seq, "{event:?}");
        }
        assert_eq!(page.scanned_to, view.revision());
    }
}

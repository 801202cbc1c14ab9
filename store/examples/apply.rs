//! What applying costs: the CPU time of one command in batches of one and of many, as members spend it for each write.
//!
//! `cargo run --release -p holdfast-store --example apply [COMMANDS] [--base APPS]`: with a base, that many apps were
//! created and written down before.

use holdfast_model::command::{NewMember, NewToken};
use holdfast_model::resource::TokenKind;
use holdfast_model::{
    Accepted, Actor, ClusterId, Command, Context, Digest, Incarnation, LogIndex, MemberId, OrgId, Outcome,
    Output, Proposal, RequestId, Role, Scope, Timestamp, TokenId, limits,
};
use holdfast_store::{Store, StoreError};
use std::error::Error;
use std::time::Duration;

/// As in the binary.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Commands of each run, unless told.
const COMMANDS: usize = 100_000;
/// Commands between two checkpoints.
const CHECKPOINT_EVERY: usize = 25_000;
/// Commands of a batch, as when hundreds of clients write at once.
const BATCH: usize = 64;

/// A store, and what the next command's context is drawn from.
struct Bench {
    store: Store,
    next: LogIndex,
    drawn: u128,
}

impl Bench {
    fn context(&mut self, actor: Actor, actor_org: Option<OrgId>) -> Context {
        self.drawn += 1;
        Context {
            actor,
            actor_org,
            source: Some([10, 0, 0, 1].into()),
            request_id: RequestId::from_bits(self.drawn),
            idempotency_key: None,
            now: Timestamp(1_700_000_000_000 + self.drawn as u64),
            entropy: u128::MAX - self.drawn,
        }
    }

    fn apply(&mut self, entries: &[Vec<Proposal>]) -> Result<Vec<Vec<Outcome>>, StoreError> {
        let outcomes = self.store.apply(self.next, entries, &self.next.0.to_be_bytes())?;
        self.next = LogIndex(self.next.0 + entries.len() as u64);
        Ok(outcomes)
    }

    fn one(&mut self, actor: Actor, command: Command) -> Result<Output, Box<dyn Error>> {
        let context = self.context(actor, None);
        let outcomes = self.apply(&[vec![Proposal { context, command }]])?;
        match outcomes.into_iter().flatten().next() {
            Some(Ok(Accepted { output, .. })) => Ok(output),
            Some(Err(rejection)) => Err(rejection.message.into()),
            None => Err("no outcome".into()),
        }
    }

    /// An initialised cluster with one org, and a token that may do everything in it.
    fn new(store: Store) -> Result<(Self, OrgId, TokenId), Box<dyn Error>> {
        let mut bench = Self { store, next: LogIndex(0), drawn: 0 };
        let token = |name: &str, digest, kind, scopes: &[Scope]| -> Result<_, Box<dyn Error>> {
            let scopes = scopes.iter().copied().collect();
            let digest = Digest([digest; 32]);
            Ok(NewToken { name: name.parse()?, digest, kind, scopes, ttl_ms: limits::TOKEN_MS_MAX })
        };
        let system = Actor::System(MemberId(1));
        bench.one(
            system,
            Command::InitCluster {
                cluster: ClusterId::from_bits(7),
                incarnation: Incarnation(1),
                member: NewMember {
                    name: "one".parse()?,
                    raft_addr: "10.0.0.1:7444".into(),
                    api_addr: "10.0.0.1:7443".into(),
                },
                operator: token("operator", 1, TokenKind::Operator, Scope::ALL)?,
            },
        )?;
        let create = Command::CreateOrg { name: "acme".parse()? };
        let Output::Org(org) = bench.one(system, create)? else { return Err("no org".into()) };
        let scopes: Vec<_> = Role::Owner.scopes().iter().collect();
        let create = Command::CreateToken(token("owner", 2, TokenKind::Org(org), &scopes)?);
        let Output::Token(token) = bench.one(system, create)? else { return Err("no token".into()) };
        Ok((bench, org, token))
    }
}

/// The CPU time of this thread, which a busy machine does not change much.
fn cpu() -> Result<Duration, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanos = stat.split_whitespace().next().ok_or("the kernel keeps no CPU time")?;
    Ok(Duration::from_nanos(nanos.parse()?))
}

/// What applying and writing down cost.
#[derive(Default)]
struct Cost {
    apply: Duration,
    checkpoints: Duration,
}

/// Creates apps in batches, with a checkpoint now and then, as members make them beside the applies.
fn create(
    bench: &mut Bench,
    (org, token): (OrgId, TokenId),
    (commands, batch, keyed): (usize, usize, bool),
) -> Result<Cost, Box<dyn Error>> {
    let mut cost = Cost::default();
    let mut left = commands;
    while left > 0 {
        let round = left.min(CHECKPOINT_EVERY);
        left -= round;
        let mut batches = Vec::with_capacity(round.div_ceil(batch));
        for first in (0..round).step_by(batch) {
            let mut entries = Vec::with_capacity(batch);
            for _ in first..round.min(first + batch) {
                let mut context = bench.context(Actor::Token(token), Some(org));
                // Keys and names in no order, as clients and people give them.
                let drawn = (bench.drawn as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                context.idempotency_key = keyed.then(|| format!("3f0e5b1c-7d1a-4c55-{drawn:016x}"));
                let name = format!("app-{drawn:016x}").parse()?;
                entries.push(vec![Proposal { context, command: Command::CreateApp { org, name } }]);
            }
            batches.push(entries);
        }
        let mut rejected = 0;
        let began = cpu()?;
        for entries in &batches {
            rejected += bench.apply(entries)?.iter().flatten().filter(|outcome| outcome.is_err()).count();
        }
        cost.apply += cpu()?.saturating_sub(began);
        if rejected > 0 {
            return Err("a command was rejected".into());
        }
        let began = cpu()?;
        bench.store.checkpoint()?;
        cost.checkpoints += cpu()?.saturating_sub(began);
    }
    Ok(cost)
}

/// Tells what commands cost over a base.
fn measure(commands: usize, base: usize) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("state.redb");
    let (mut bench, org, token) = Bench::new(Store::open(&path)?)?;
    create(&mut bench, (org, token), (base, BATCH, false))?;
    for batch in [1, BATCH] {
        for keyed in [false, true] {
            let cost = create(&mut bench, (org, token), (commands, batch, keyed))?;
            let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / commands as f64;
            println!(
                "over {base:>7} apps, batches of {batch:>2}, {}: {:>6.2} µs of CPU a command to apply, {:>6.2} µs to write down",
                if keyed { "with keys   " } else { "without keys" },
                each(cost.apply),
                each(cost.checkpoints),
            );
        }
    }
    println!("digest {}", bench.store.digest());
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut commands, mut base) = (COMMANDS, 0);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--base" => base = arguments.next().ok_or("--base takes a number of apps")?.parse()?,
            number => commands = number.parse()?,
        }
    }
    measure(commands, base)
}

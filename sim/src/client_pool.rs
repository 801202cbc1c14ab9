//! The clients: each asks one thing at a time, of any member, again and again until it is told.
//!
//! Now and then one asks two members at once, or repeats a request that was answered long ago: the first answer must
//! come again (I4).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_model::agent::ProxyProtocol;
use holdfast_model::resource::RouteTarget;
use holdfast_model::{Command, EnvId, Hostname, PortName, ProcessName};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::client::{self, Account, Answer, Name, Question, Thing, Told};
use crate::history::Asked;
use crate::host::Host;
use crate::trace::Trace;

/// Names that clients use; few, so that they meet.
const NAMES: [&str; 5] = ["alpha", "bravo", "charlie", "delta", "echo"];
/// Hostnames that clients claim in two envs; fewer still.
const HOSTNAMES: [&str; 4] = ["one.example", "two.example", "three.example", "four.example"];
/// How long a client waits for an answer before it asks another member, in milliseconds.
const PATIENCE_MS: std::ops::Range<u64> = 500..4000;

/// All clients.
pub(crate) struct ClientPool {
    account: Account,
    names: Vec<Name>,
    /// What every route leads to.
    target: (ProcessName, PortName),
    rng: StdRng,
    clients: Vec<Client>,
    /// Answers of tasks that run on hosts.
    told: Arc<Mutex<Vec<(u64, Told)>>>,
    next_attempt: u64,
    /// Which request an attempt belongs to, and which host was asked.
    attempts: BTreeMap<u64, (usize, u64)>,
    history: Vec<Asked>,
    /// Counts calls and answers.
    moments: u64,
    /// Whether new requests are begun.
    open: bool,
    /// How long clients think, at most, in milliseconds.
    think_ms: u64,
    answered: u64,
    repeats: u64,
}

#[derive(Clone, Copy)]
enum Client {
    Thinking { until_ms: u64 },
    Asking { request: usize, repeats: bool, again_ms: u64 },
}

impl ClientPool {
    pub(crate) fn new(seed: u64, account: Account, clients: usize, think_ms: u64) -> Result<Self, String> {
        let apps = NAMES.iter().filter_map(|name| name.parse().ok().map(Name::App));
        let hosts = HOSTNAMES.iter().filter_map(|name| name.parse().ok().map(Name::Host));
        let process = "web".parse().map_err(|_| "a process's name is wrong")?;
        let port = "https".parse().map_err(|_| "a port's name is wrong")?;
        Ok(ClientPool {
            account,
            names: apps.chain(hosts).collect(),
            target: (process, port),
            rng: StdRng::seed_from_u64(seed),
            clients: vec![Client::Thinking { until_ms: 0 }; clients],
            told: Arc::default(),
            next_attempt: 0,
            attempts: BTreeMap::new(),
            history: Vec::new(),
            moments: 0,
            open: true,
            think_ms,
            answered: 0,
            repeats: 0,
        })
    }

    /// From now on only what was begun is brought to its end.
    pub(crate) fn close(&mut self) {
        self.open = false;
    }

    /// Whether every request has its answer.
    pub(crate) fn is_quiet(&self) -> bool {
        self.clients.iter().all(|client| matches!(client, Client::Thinking { .. }))
    }

    pub(crate) fn history(&self) -> &[Asked] {
        &self.history
    }

    /// Requests that were answered, and repeats that were.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.answered, self.repeats)
    }

    /// One millisecond of all clients.
    pub(crate) fn tick(&mut self, now_ms: u64, hosts: &[Host], trace: &mut Trace) -> Result<(), String> {
        let told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        for (attempt, told) in told {
            let Some((request, host)) = self.attempts.remove(&attempt) else { continue };
            let may_fail = hosts.iter().any(|h| h.id == host && (h.may_fail() || h.member().is_none()));
            self.hear(request, told, may_fail, now_ms, trace)?;
        }
        for number in 0..self.clients.len() {
            match self.clients[number] {
                Client::Thinking { until_ms } if self.open && until_ms <= now_ms => {
                    let (request, repeats) = self.choose();
                    self.clients[number] = Client::Asking { request, repeats, again_ms: now_ms };
                    if !repeats {
                        let asked = &self.history[request];
                        trace.line(
                            now_ms,
                            format_args!(
                                "client {number} asks {request} {} {:?}",
                                asked.name, asked.question
                            ),
                        );
                    }
                    self.send(number, request, repeats, now_ms, hosts);
                }
                Client::Asking { request, repeats, again_ms } if again_ms <= now_ms => {
                    self.send(number, request, repeats, now_ms, hosts);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What to ask next: something new, or something old again.
    fn choose(&mut self) -> (usize, bool) {
        if self.rng.random_bool(0.1) {
            let old: Vec<usize> = self
                .history
                .iter()
                .enumerate()
                .filter(|(_, asked)| asked.answered.is_some() && asked.question.writes())
                .map(|(at, _)| at)
                .collect();
            if !old.is_empty() {
                return (old[self.rng.random_range(0..old.len())], true);
            }
        }
        let name = self.names[self.rng.random_range(0..self.names.len())].clone();
        let known: Vec<Thing> = self
            .history
            .iter()
            .rev()
            .filter(|asked| asked.name == name)
            .filter_map(|asked| match asked.answered?.1 {
                Answer::Created(id, _) | Answer::Found(Some(id), _) => Some(id),
                _ => None,
            })
            .take(3)
            .collect();
        let question = match &name {
            // Nobody reads routes by their hostname.
            Name::Host(host) => match self.rng.random_range(0..7) {
                4.. if !known.is_empty() => self.deletion(&known),
                _ => self.claim(host.clone()),
            },
            Name::App(app) => match self.rng.random_range(0..11) {
                0..4 => {
                    let command = Command::CreateApp { org: self.account.org, name: app.clone() };
                    Question::Create(client::way(&self.account, command, &mut self.rng))
                }
                4..7 if !known.is_empty() => self.deletion(&known),
                7 => Question::StaleRead,
                _ => Question::Read,
            },
        };
        self.moments += 1;
        self.history.push(Asked { name, question, called: self.moments, answered: None });
        (self.history.len() - 1, false)
    }

    fn deletion(&mut self, known: &[Thing]) -> Question {
        let thing = known[self.rng.random_range(0..known.len())];
        let command = match thing {
            Thing::App(app) => Command::DeleteApp { app, expected_version: None },
            Thing::Route(route) => Command::DeleteRoute { route, expected_version: None },
        };
        Question::Delete(thing, client::way(&self.account, command, &mut self.rng))
    }

    fn claim(&mut self, hostname: Hostname) -> Question {
        let env: EnvId = self.account.envs[self.rng.random_range(0..self.account.envs.len())];
        let (process, port) = self.target.clone();
        let command = Command::CreateRoute {
            env,
            target: RouteTarget::TlsPassthrough { hostname },
            listen_port: 443,
            process,
            port,
            proxy_protocol: ProxyProtocol::Off,
        };
        Question::Claim(env, client::way(&self.account, command, &mut self.rng))
    }

    fn send(&mut self, number: usize, request: usize, repeats: bool, now_ms: u64, hosts: &[Host]) {
        let members: Vec<&Host> = hosts.iter().filter(|host| host.member().is_some()).collect();
        let again_ms =
            if members.is_empty() { now_ms + 20 } else { now_ms + self.rng.random_range(PATIENCE_MS) };
        self.clients[number] = Client::Asking { request, repeats, again_ms };
        let at_once = if self.rng.random_bool(0.15) { 2 } else { 1 };
        for _ in 0..at_once {
            if members.is_empty() {
                return;
            }
            let host = members[self.rng.random_range(0..members.len())];
            let Some(member) = host.api().cloned() else { continue };
            let attempt = self.next_attempt;
            self.next_attempt += 1;
            self.attempts.insert(attempt, (request, host.id));
            let Asked { name, question, .. } = self.history[request].clone();
            let (told, account) = (self.told.clone(), self.account.clone());
            host.spawn(async move {
                let answer = client::ask(member, account, name, question).await;
                told.lock().unwrap_or_else(PoisonError::into_inner).push((attempt, answer));
            });
        }
    }

    fn hear(
        &mut self,
        request: usize,
        told: Told,
        may_fail: bool,
        now_ms: u64,
        trace: &mut Trace,
    ) -> Result<(), String> {
        let asker = self
            .clients
            .iter()
            .position(|client| matches!(client, Client::Asking { request: asked, .. } if *asked == request));
        trace.line(now_ms, format_args!("request {request} is told {told:?}"));
        let answer = match told {
            Told::Answer(answer) => answer,
            Told::Wrong(reason) => return Err(format!("request {request}: {reason}")),
            Told::Failed(reason) if !may_fail => {
                return Err(format!("request {request}: a member whose disk is well answers {reason}"));
            }
            Told::Nothing(_) | Told::Failed(_) => {
                if let Some(Client::Asking { again_ms, .. }) = asker.map(|asker| &mut self.clients[asker]) {
                    *again_ms = (*again_ms).min(now_ms + self.rng.random_range(5..100));
                }
                return Ok(());
            }
        };
        let asked = &mut self.history[request];
        match asked.answered {
            Some((_, first)) if asked.question.writes() && first != answer => {
                return Err(format!(
                    "I4: request {request} was told {first:?} first and {answer:?} when it was repeated"
                ));
            }
            Some(_) => {}
            None => {
                self.moments += 1;
                asked.answered = Some((self.moments, answer));
                self.answered += 1;
            }
        }
        if let Some(asker) = asker {
            if matches!(self.clients[asker], Client::Asking { repeats: true, .. }) {
                self.repeats += 1;
            }
            let until_ms = now_ms + self.rng.random_range(0..=self.think_ms);
            self.clients[asker] = Client::Thinking { until_ms };
        }
        Ok(())
    }
}

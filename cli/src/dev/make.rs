//! Bringing a cluster up: made on the first run, started again from its folders on later ones. Each step that is done is
//! written to the plan, so that a run that was stopped half-way is taken up where it was.

use super::plan::Member;
use super::{Cluster, EDGE, NODE, child};
use crate::args::operator::Dev;
use crate::assets;
use crate::commands::{ca, secret_text};
use crate::failure::{Failure, with_sources};
use crate::login::Login;
use crate::session;
use holdfast_client::Client;
use holdfast_identity::files::write_secret;
use holdfast_jail::cgroup::Hierarchy;
use holdfast_model::api::{CreateEnrolment, CreatedEnrolment, MemberRole};
use holdfast_model::resource::EnrolmentKind;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long the cluster may take to come up.
const UP_MAX: Duration = Duration::from_secs(90);
/// Between two looks while it comes up.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What `server init --json` prints.
#[derive(Deserialize)]
struct Made {
    ca_pin: String,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl Cluster {
    /// Brings every member up: the first is made or started, the others join or are started.
    pub(super) async fn start_members(&mut self) -> Result<(), Failure> {
        let Some(first) = self.plan.members.first().cloned() else {
            return Err(Failure::Host("The plan has no members; remove the folder to start anew.".into()));
        };
        if !first.joined {
            self.output.remark("Making a cluster …");
            self.init(&first).await?;
        }
        let joined: Vec<Member> = self.plan.members.iter().filter(|m| m.joined).cloned().collect();
        for member in &joined {
            self.start_member(member)?;
        }
        self.login().await?;
        self.wait("a leader", async |client| client.cluster().await.is_ok_and(|c| c.item.leader.is_some()))
            .await?;
        for index in 1..self.plan.members.len() {
            if !self.plan.members[index].joined {
                self.join_member(index).await?;
            }
        }
        let wanted = self.plan.members.len();
        self.wait("every member to vote", async |client| {
            let Ok(cluster) = client.cluster().await else { return false };
            cluster.item.members.iter().filter(|m| m.role == MemberRole::Voter).count() >= wanted
        })
        .await
    }

    async fn init(&mut self, member: &Member) -> Result<(), Failure> {
        let folder = self.folder.of(&member.name);
        // Half-made by a run that was stopped: nothing was acknowledged yet.
        remove(&folder)?;
        let mut arguments = words(&["server", "init", "--json", "--name", &member.name]);
        arguments.extend(words(&["--data-dir", &folder.display().to_string()]));
        arguments.extend(words(&[
            "--api-addr",
            &member.api.to_string(),
            "--raft-addr",
            &member.raft.to_string(),
        ]));
        arguments.extend(words(&["--token-file", &self.folder.token().display().to_string()]));
        let printed = child::run(&self.program, &arguments, &self.folder.log(&member.name)).await?;
        let made: Made = serde_json::from_slice(&printed).map_err(|e| {
            Failure::Host(format!("`holdfast server init` printed what is not understood: {e}."))
        })?;
        self.plan.ca_pin = Some(made.ca_pin);
        self.plan.members[0].joined = true;
        self.plan.save(&self.folder)
    }

    async fn join_member(&mut self, index: usize) -> Result<(), Failure> {
        let member = self.plan.members[index].clone();
        let folder = self.folder.of(&member.name);
        remove(&folder)?;
        let mut arguments = words(&["server", "join", "--name", &member.name]);
        arguments.extend(words(&["--data-dir", &folder.display().to_string()]));
        arguments.extend(words(&[
            "--api-addr",
            &member.api.to_string(),
            "--raft-addr",
            &member.raft.to_string(),
        ]));
        self.join(&member.name, EnrolmentKind::Member, arguments).await?;
        self.plan.members[index].joined = true;
        self.plan.save(&self.folder)?;
        self.start_member(&member)
    }

    /// Runs a `join` command with a fresh one-time secret, which lives in a file no longer than that.
    async fn join(&self, name: &str, kind: EnrolmentKind, mut arguments: Vec<String>) -> Result<(), Failure> {
        let invited: CreatedEnrolment =
            self.client()?.create_enrolment(&CreateEnrolment { kind, ttl_s: None }).await?.item;
        let secret_file = self.folder.of(&format!("{name}.secret"));
        secret_text::write(&secret_file, &Zeroizing::new(invited.secret))?;
        for server in self.plan.servers() {
            arguments.extend([String::from("--server"), server]);
        }
        arguments.extend(words(&["--ca-pin", &invited.ca_pin]));
        arguments.extend(words(&["--secret-file", &secret_file.display().to_string()]));
        let joined = child::run(&self.program, &arguments, &self.folder.log(name)).await;
        std::fs::remove_file(&secret_file).map_err(Failure::file("remove", &secret_file))?;
        joined.map(drop)
    }

    fn start_member(&mut self, member: &Member) -> Result<(), Failure> {
        let folder = self.folder.of(&member.name).display().to_string();
        let addresses = BTreeMap::from([
            ("api".into(), member.api.to_string()),
            ("raft".into(), member.raft.to_string()),
        ]);
        let run = words(&["server", "run", "--loopback-registries", "--data-dir", &folder]);
        self.start(&member.name, "server", run, addresses)
    }

    /// Writes the CA certificate and a login for the CLI, once a member shows the certificate.
    async fn login(&self) -> Result<(), Failure> {
        let pin = self.plan.ca_pin.as_deref().unwrap_or_default();
        let deadline = Instant::now() + UP_MAX;
        let ca_pem = loop {
            match ca::fetch(&self.plan.servers(), pin).await {
                Ok(pem) => break pem,
                Err(failure) if Instant::now() >= deadline => return Err(failure),
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
        write_secret(&self.folder.ca(), ca_pem.as_bytes()).map_err(|e| Failure::Host(with_sources(&e)))?;
        let token = secret_text::read(Some(&self.folder.token()), "operator's token", true)?;
        // An org that was chosen by hand stays chosen.
        let org = Login::load(&self.folder.context()).ok().and_then(|login| login.org);
        Login { servers: self.plan.servers(), ca_pem, token, org }.save(&self.folder.context())
    }

    fn client(&self) -> Result<Client, Failure> {
        session::client(&Login::load(&self.folder.context())?)
    }

    /// Waits until `what` is so.
    async fn wait(&mut self, what: &str, so: impl AsyncFn(&Client) -> bool) -> Result<(), Failure> {
        let client = self.client()?.with_deadline(Duration::from_secs(5));
        let deadline = Instant::now() + UP_MAX;
        while !so(&client).await {
            if Instant::now() >= deadline {
                let logs = self.folder.root().join("logs");
                return Err(Failure::Host(format!(
                    "Waited {} s for {what}; {} says more.",
                    UP_MAX.as_secs(),
                    logs.display()
                )));
            }
            self.report_ended();
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Starts the edge, after it joined.
    pub(super) async fn start_edge(&mut self, arguments: &Dev) -> Result<(), Failure> {
        if arguments.no_edge {
            return Ok(());
        }
        let folder = self.folder.of(EDGE);
        if !self.plan.edge_joined {
            remove(&folder)?;
            let join = words(&["edge", "join", "--name", EDGE, "--data-dir", &folder.display().to_string()]);
            self.join(EDGE, EnrolmentKind::Edge, join).await?;
            self.plan.edge_joined = true;
            self.plan.save(&self.folder)?;
        }
        let mut run = words(&["edge", "run", "--data-dir", &folder.display().to_string()]);
        let listen: Vec<String> = if arguments.listen.is_empty() {
            words(&["127.0.0.1", "::1"])
        } else {
            arguments.listen.iter().map(ToString::to_string).collect()
        };
        run.extend(listen.iter().flat_map(|address| [String::from("--listen"), address.clone()]));
        self.start(EDGE, "edge", run, BTreeMap::from([("listen".into(), listen.join(" "))]))
    }

    /// Starts the node, after it joined; without what microVMs need it says so and goes on without.
    pub(super) async fn start_node(&mut self, arguments: &Dev) -> Result<(), Failure> {
        if arguments.no_node {
            return Ok(());
        }
        let able = assets::privileges().and_then(|()| assets::find(arguments.assets.as_deref()));
        let assets = match able {
            Ok(assets) => assets,
            Err(why) => {
                self.output.remark(format!("No node runs, so nothing can be deployed: {why}."));
                return Ok(());
            }
        };
        let folder = self.folder.of(NODE);
        if !self.plan.node_joined {
            remove(&folder)?;
            let join = words(&["node", "join", "--name", NODE, "--data-dir", &folder.display().to_string()]);
            self.join(NODE, EnrolmentKind::Node, join).await?;
            self.plan.node_joined = true;
            self.plan.save(&self.folder)?;
        }
        let mut run = words(&[
            "node",
            "run",
            "--data-dir",
            &folder.display().to_string(),
            "--assets",
            &assets.display().to_string(),
            "--backups",
            &self.folder.of("backups").display().to_string(),
        ]);
        // What is right for a laptop, and said: a real node wants its operator to decide this.
        if let Err(why) = Hierarchy::find() {
            self.output.remark(format!("MicroVMs run jailed, but without cgroups. {why}"));
            run.push("--without-cgroups".to_owned());
        }
        self.start(NODE, "node", run, BTreeMap::new())
    }

    /// Waits until a member has heard from every agent that was started.
    pub(super) async fn wait_for_agents(&mut self) -> Result<(), Failure> {
        let started = |role| self.processes.iter().any(|p| p.record.role == role);
        if started("edge") {
            self.wait("the edge to report", async |client| {
                client.edges().await.is_ok_and(|edges| edges.items.iter().any(|e| e.contact.is_some()))
            })
            .await?;
        }
        let started = |role| self.processes.iter().any(|p| p.record.role == role);
        if started("node") {
            self.wait("the node to report", async |client| {
                client.nodes().await.is_ok_and(|nodes| nodes.items.iter().any(|n| n.contact.is_some()))
            })
            .await?;
        }
        Ok(())
    }
}

fn remove(folder: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::file("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

//! `holdfast dev`: a whole cluster on one machine, without any configuration.
//!
//! Every part is a real process with a folder of its own, as it would be on many machines. A process that ends is
//! reported and not started again: whoever tests the cluster does that. Everything that was started is ended.

mod child;
mod make;
mod plan;
mod record;

use crate::agents::shutdown::Asked;
use crate::args::operator::Dev;
use crate::failure::{Failure, with_sources};
use crate::output::Output;
use child::{Process, Spec};
use holdfast_identity::files::write_secret;
use plan::{Folder, Plan};
use record::{RECORD_VERSION, Record};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

/// Between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// The names of the agents.
const EDGE: &str = "edge-1";
const NODE: &str = "node-1";

/// A cluster that is being made or runs.
struct Cluster {
    program: PathBuf,
    folder: Folder,
    plan: Plan,
    processes: Vec<Process>,
    output: Output,
    /// Held for as long as this process lives: two on one folder would fight.
    _lock: File,
}

/// Makes or starts the cluster, and runs it until told to stop.
pub(crate) async fn run(arguments: Dev, output: Output) -> Result<(), Failure> {
    let mut asked = Asked::listen()?;
    let folder = Folder::open(&arguments.data_dir)?;
    let lock = lock(&folder)?;
    let plan = Plan::load_or_make(&folder, &arguments)?;
    let program =
        std::env::current_exe().map_err(|e| Failure::Host(format!("Cannot find this program: {e}.")))?;
    let mut cluster = Cluster { program, folder, plan, processes: Vec::new(), output, _lock: lock };
    let outcome = tokio::select! {
        outcome = cluster.live(&arguments) => outcome,
        () = asked.wait() => Ok(()),
    };
    cluster.end().await;
    outcome
}

fn lock(folder: &Folder) -> Result<File, Failure> {
    let path = folder.root().join("lock");
    let file = File::create(&path).map_err(Failure::file("open", &path))?;
    file.try_lock().map_err(|_| {
        Failure::Host(format!("Another `holdfast dev` runs in {}; stop it first.", folder.root().display()))
    })?;
    Ok(file)
}

impl Cluster {
    /// Brings everything up, then watches. Returns only with a failure.
    async fn live(&mut self, arguments: &Dev) -> Result<(), Failure> {
        self.start_members().await?;
        self.start_edge(arguments).await?;
        self.start_node(arguments).await?;
        self.wait_for_agents().await?;
        self.write_record()?;
        self.say_how_to_use();
        loop {
            self.report_ended();
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Starts a process and remembers it.
    fn start(
        &mut self,
        name: &str,
        role: &'static str,
        arguments: Vec<String>,
        addresses: BTreeMap<String, String>,
    ) -> Result<(), Failure> {
        let spec = Spec {
            name: name.to_owned(),
            role,
            arguments,
            data_dir: self.folder.of(name),
            log_file: self.folder.log(name),
            addresses,
        };
        self.processes.push(Process::start(&self.program, spec)?);
        Ok(())
    }

    fn write_record(&self) -> Result<(), Failure> {
        let record = Record {
            version: RECORD_VERSION,
            pid: std::process::id(),
            data_dir: self.folder.root().to_owned(),
            context_file: self.folder.context(),
            token_file: self.folder.token(),
            ca_file: self.folder.ca(),
            servers: self.plan.servers(),
            processes: self.processes.iter().map(|p| p.record.clone()).collect(),
        };
        let text = serde_json::to_vec_pretty(&record).map_err(|e| Failure::Host(with_sources(&e)))?;
        write_secret(&self.folder.record(), &text).map_err(|e| Failure::Host(with_sources(&e)))
    }

    fn say_how_to_use(&self) {
        let mut lines = vec!["The cluster runs. In another terminal:".to_owned()];
        lines.push(format!("  export HOLDFAST_CONTEXT={}", self.folder.context().display()));
        lines.push("  holdfast status".to_owned());
        lines.push(
            "  holdfast org create acme && holdfast app create shop && holdfast env create prod --app shop"
                .to_owned(),
        );
        lines.push(format!(
            "Logs are in {}. Ctrl-C stops everything.",
            self.folder.root().join("logs").display()
        ));
        self.output.remark(lines.join("\n"));
    }

    fn report_ended(&mut self) {
        for process in &mut self.processes {
            if let Some(status) = process.newly_ended() {
                self.output.remark(format!(
                    "{} (pid {}) ended with {status}; it is not started again. Its log: {}",
                    process.record.name,
                    process.record.pid,
                    process.record.log_file.display()
                ));
            }
        }
    }

    /// Ends every process, agents first, and then what the node left running: its microVMs.
    async fn end(&mut self) {
        self.output.remark("Stopping.");
        // The record says what runs; now nothing does.
        let _ = std::fs::remove_file(self.folder.record());
        for role in ["edge", "node", "server"] {
            let of_role = || self.processes.iter().filter(|p| p.record.role == role);
            of_role().for_each(Process::ask_to_end);
            for process in self.processes.iter_mut().filter(|p| p.record.role == role) {
                if process.end().await {
                    self.output
                        .remark(format!("{} did not end when asked and was killed.", process.record.name));
                }
            }
        }
        let node = self.folder.of(NODE);
        if self.plan.node_joined && node.exists() {
            let arguments = ["node", "wipe", "--data-dir"].map(str::to_owned).into_iter();
            let arguments: Vec<String> = arguments.chain([node.display().to_string()]).collect();
            if let Err(failure) = child::run(&self.program, &arguments, &self.folder.log(NODE)).await {
                self.output.remark(format!("MicroVMs may be left: {failure}"));
            }
        }
    }
}

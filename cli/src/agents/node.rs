//! `holdfast node join|run|status|wipe`: starts the node agent with what joining left in its folder.

use crate::agents::enrolled::{self, Agent};
use crate::agents::renewal;
use crate::agents::shutdown::Asked;
use crate::args::Global;
use crate::args::operator::{AgentFolder, NodeJoin, NodeRun};
use crate::commands::instances::image;
use crate::failure::{Failure, with_sources};
use crate::output::{Output, or_dash, table, word};
use holdfast_jail::cgroup::Choice;
use holdfast_jail::ids::IdRange;
use holdfast_model::command::Joiner;
use holdfast_model::limits::CPU_OVERCOMMIT_MILLI;
use holdfast_node::agent::{HostConfig, NodeConfig};
use holdfast_node::host::{CapacityOverride, VmmChoice};
use holdfast_node::logs::retention::Retention;
use holdfast_node::network::guard::Rate;
use holdfast_node::status::NodeStatus;
use holdfast_node::vmm::jail::JailConfig;
use std::path::{Path, PathBuf};

fn host(error: &dyn std::error::Error) -> Failure {
    Failure::Host(with_sources(error))
}

/// Joins as a node with what this host has.
pub(crate) async fn join(arguments: NodeJoin, global: &Global, output: Output) -> Result<(), Failure> {
    let capacity = CapacityOverride { memory_mib: arguments.memory_mib, cpu_milli: arguments.cpu_milli };
    let capacity = holdfast_node::host::capacity(capacity).map_err(|e| host(&e))?;
    let joiner = Joiner::Node { name: arguments.name, capacity };
    let enrolled = enrolled::join(&arguments.data_dir, joiner, arguments.join, global).await?;
    output.show(&enrolled, || {
        format!("Joined; run it: holdfast node run --data-dir {}", arguments.data_dir.display())
    })
}

/// Runs the agent until told to stop. MicroVMs run on.
pub(crate) async fn run(arguments: NodeRun) -> Result<(), Failure> {
    let mut asked = Asked::listen()?;
    let data_dir = arguments.data_dir.canonicalize().map_err(Failure::file("find", &arguments.data_dir))?;
    let assets_dir = crate::assets::find(arguments.assets.as_deref())
        .map_err(|why| Failure::Host(format!("The node cannot run: {why}.")))?;
    let cgroups = if arguments.without_cgroups { Choice::Without } else { Choice::Required };
    let ids = IdRange::new(arguments.vmm_uid_first, arguments.vmm_uids)
        .map_err(|e| Failure::Usage(e.to_string()))?;
    let jail = JailConfig { cgroups, ids, ..JailConfig::default() };
    let rate = Rate::megabits(arguments.instance_mbit).map_err(|e| Failure::Usage(e.to_string()))?;
    let bounds = &arguments.logs;
    let (one, all) = (bounds.instance_mib.saturating_mul(1 << 20), bounds.node_mib.saturating_mul(1 << 20));
    let logs =
        Retention::new(one, all, bounds.age, bounds.ended).map_err(|e| Failure::Usage(e.to_string()))?;
    let volumes_dir = arguments.volumes_dir.as_deref().map(absolute).transpose()?;
    // A folder may be named from where one is; the address of a service is not a path.
    let backups = match arguments.backups.as_deref() {
        Some(address) if !address.contains("://") => {
            Some(absolute(Path::new(address))?.display().to_string())
        }
        address => address.map(str::to_owned),
    };
    loop {
        let agent = Agent::load(&data_dir)?;
        let config = NodeConfig {
            host: HostConfig {
                data_dir: data_dir.clone(),
                assets_dir: assets_dir.clone(),
                capacity: CapacityOverride {
                    memory_mib: arguments.memory_mib,
                    cpu_milli: arguments.cpu_milli,
                },
                vmm: VmmChoice::default(),
                jail: jail.clone(),
                rate,
                logs,
                images_bytes_max: arguments.images_mib.saturating_mul(1 << 20),
                metrics: arguments.metrics.clone(),
                volumes_dir: volumes_dir.clone(),
                backups: backups.clone(),
            },
            endpoints: agent.endpoints.clone(),
            ca_file: agent.ca_file(),
            credential_file: agent.credential_file(),
        };
        let mut told = false;
        // The agent comes back with the new certificate; that it was gone for a moment restarts nothing (I7).
        let until = async {
            tokio::select! {
                () = asked.wait() => told = true,
                () = renewal::once(&agent) => {}
            }
        };
        holdfast_node::agent::run(config, until).await.map_err(|e| host(&e))?;
        if told {
            return Ok(());
        }
    }
}

/// Shows what the agent on this host last wrote about itself.
pub(crate) async fn status(arguments: AgentFolder, output: Output) -> Result<(), Failure> {
    let status = NodeStatus::read(&arguments.data_dir).map_err(|e| host(&e))?;
    output.show(&status, || text(&status))
}

fn text(status: &NodeStatus) -> String {
    let follows = match (&status.following, &status.unreachable) {
        (Some(member), _) => format!("follows {member}"),
        (None, Some(why)) => format!("follows no member ({why}) and runs what it knows"),
        (None, None) => "follows no member and runs what it knows".into(),
    };
    let mut parts = vec![format!(
        "Node agent (pid {}) {follows} · acts on revision {} · {} MiB, {} thousandths of CPU (each promised {} times), {} MiB of disk free · {}",
        status.pid,
        or_dash(status.revision),
        status.capacity.memory_mib,
        status.capacity.cpu_milli,
        CPU_OVERCOMMIT_MILLI / 1_000,
        or_dash(status.disk_free_mib),
        status.vmm
    )];
    if status.quarantined {
        parts.push(
            "Quarantined: no instance has a network, nothing is started or removed. Look into what is here, then wipe this host and join it under another name.".into(),
        );
    }
    if let Some(held) = status.held {
        parts.push(format!(
            "Holds back revision {}: it would remove {} of {} instances.",
            held.revision, held.removes, held.of
        ));
    }
    let rows = status.instances.iter().map(|instance| {
        [
            instance.observation.instance.to_string(),
            or_dash(instance.name.clone()),
            word(&instance.observation.state),
            instance.image.map_or_else(|| instance.phase.clone(), |progress| image(&progress)),
            instance.observation.restarts.to_string(),
            or_dash(instance.pid),
            or_dash(instance.address),
        ]
    });
    parts.push(table(["INSTANCE", "NAME", "STATE", "PHASE", "RESTARTS", "PID", "ADDRESS"], rows));
    parts.join("\n\n")
}

#[derive(serde::Serialize)]
struct Wiped {
    ended: usize,
}

/// Ends every microVM of the folder.
pub(crate) async fn wipe(arguments: AgentFolder, output: Output) -> Result<(), Failure> {
    let data_dir: PathBuf = absolute(&arguments.data_dir)?;
    let ended = holdfast_node::agent::wipe(&data_dir).await.map_err(|e| host(&e))?;
    output.show(&Wiped { ended }, || format!("{ended} microVMs ended."))
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(Failure::file("find", path))
}

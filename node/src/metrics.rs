//! What the agent counts, for Prometheus: of each microVM, and of the host.
//!
//! Gathered at each scrape from what the agent publishes anyway and from `/proc`; nothing here holds the loop up. Labels are
//! ids and names of the control plane's, never anything that a guest said, and the microVMs that are told of are bounded
//! ([`VMS_MAX`]).

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use holdfast_client::{Link, Published};
use holdfast_metrics::{Exposition, Listen, Listener, serve};
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;
use holdfast_model::resource::Capacity;
use tokio::sync::watch;

use crate::admission::need;
use crate::executor::Executor;
use crate::logs::{Logs, RingStats, chain};
use crate::machine::now_ms;
use crate::supervisor::{InstanceView, Pulse, Snapshot};

/// MicroVMs of which one scrape tells at most: as many as a node reports. The rest is counted.
pub const VMS_MAX: usize = 1_000;

/// After the address could not be had. The agent runs on without: its microVMs matter more (I5).
const BIND_PAUSE: Duration = Duration::from_secs(30);

/// Ticks of the kernel's process times in a second: USER_HZ, which is 100 on every architecture that we run on.
const TICKS_PER_S: f64 = 100.0;

/// Where the numbers come from.
pub(crate) struct Sources {
    pub(crate) capacity: Capacity,
    pub(crate) executor: Arc<Executor>,
    pub(crate) logs: Arc<Logs>,
    pub(crate) snapshots: watch::Receiver<Option<Snapshot>>,
    pub(crate) pulse: watch::Receiver<Pulse>,
    pub(crate) desired: watch::Receiver<Published<NodeInstance>>,
    pub(crate) link: watch::Receiver<Link>,
}

/// Serves until it is dropped.
pub(crate) async fn run(listen: Listen, sources: Sources) -> std::convert::Infallible {
    let sources = Arc::new(sources);
    let source = Arc::new(move || {
        let sources = Arc::clone(&sources);
        async move { tokio::task::spawn_blocking(move || sources.gather()).await.unwrap_or_default() }.boxed()
    });
    loop {
        match Listener::bind(&listen).await {
            Ok(listener) => {
                tracing::info!(%listen, "serving metrics");
                match serve(listener, source).await {}
            }
            Err(error) => tracing::error!(error = %chain(&error), "no metrics are served for now"),
        }
        tokio::time::sleep(BIND_PAUSE).await;
    }
}

/// A microVM's VMM, as the kernel counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Process {
    cpu_s: f64,
    resident_bytes: f64,
}

/// Bytes that a TAP has carried, as the host sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Traffic {
    received: u64,
    sent: u64,
}

impl Sources {
    fn gather(&self) -> Exposition {
        let mut out = Exposition::default();
        let snapshot = self.snapshots.borrow().clone().unwrap_or_default();
        let view = self.desired.borrow().clone();
        self.host(&mut out, &snapshot);
        let spec = |id: &InstanceId| view.as_ref().and_then(|view| view.items.get(id)).cloned();
        let promised =
            snapshot.instances.iter().filter(|(id, seen)| !seen.observed.observation(**id).state.is_final());
        let (mut memory_mib, mut cpu_milli) = (0, 0);
        for spec in promised.filter_map(|(id, _)| spec(id)) {
            let need = need(&spec);
            memory_mib += need.0;
            cpu_milli += need.1;
        }
        out.gauge(
            "holdfast_node_memory_promised_bytes",
            "Memory of the instances here, with their VMMs'",
            &[],
            mib(memory_mib),
        );
        out.gauge("holdfast_node_cpu_promised_cores", "CPU of the instances here", &[], cores(cpu_milli));
        let logs = self.logs.stats();
        let traffic = traffic(&fs::read_to_string("/proc/self/net/dev").unwrap_or_default());
        for (id, seen) in snapshot.instances.iter().take(VMS_MAX) {
            let traffic = traffic.get(&self.executor.tap_name(*id)).copied();
            vm(&mut out, *id, seen, spec(id).as_deref(), logs.get(id), traffic);
        }
        let unlisted = snapshot.instances.len().saturating_sub(VMS_MAX);
        out.gauge(
            "holdfast_node_vms_left_out",
            "Instances of which this answer does not tell",
            &[],
            unlisted as f64,
        );
        out
    }

    fn host(&self, out: &mut Exposition, snapshot: &Snapshot) {
        let boots = self.executor.host().boots();
        let offered = if boots { self.capacity } else { Capacity::default() };
        out.flag("holdfast_node_vmm_boots", "Whether a VMM is known to boot a guest here", boots);
        out.gauge(
            "holdfast_node_memory_capacity_bytes",
            "Memory offered to instances",
            &[],
            mib(offered.memory_mib),
        );
        out.gauge(
            "holdfast_node_cpu_capacity_cores",
            "CPU offered to instances",
            &[],
            cores(offered.cpu_milli),
        );
        let mut states: BTreeMap<&'static str, u32> = BTreeMap::new();
        for seen in snapshot.instances.values() {
            *states.entry(state(seen)).or_default() += 1;
        }
        for (state, number) in states {
            out.gauge(
                "holdfast_node_instances",
                "Instances by state",
                &[("state", state)],
                f64::from(number),
            );
        }
        if let Ok(bytes) = self.executor.images().used_bytes() {
            out.gauge(
                "holdfast_node_image_cache_bytes",
                "Bytes of images on this node's disk",
                &[],
                bytes as f64,
            );
        }
        out.gauge(
            "holdfast_node_image_cache_bound_bytes",
            "Bytes that images may take as far as nothing needs them",
            &[],
            self.executor.images().bytes_max() as f64,
        );
        let evicted = self.executor.images().evictions();
        for (kind, number) in [("root", evicted.roots), ("blob", evicted.blobs)] {
            out.counter(
                "holdfast_node_image_evictions",
                "Roots and blobs collected by this agent",
                &[("kind", kind)],
                number as f64,
            );
        }
        out.counter(
            "holdfast_node_image_evicted_bytes",
            "Bytes of what this agent collected",
            &[],
            evicted.bytes as f64,
        );
        out.gauge(
            "holdfast_node_logs_bytes",
            "Bytes of instances' logs on disk",
            &[],
            self.logs.used_bytes() as f64,
        );
        let follows = matches!(*self.link.borrow(), Link::Up { .. });
        out.flag("holdfast_node_follows", "Whether the control plane is followed", follows);
        if let Some(view) = self.desired.borrow().as_ref() {
            out.gauge(
                "holdfast_node_revision",
                "The revision that is acted on",
                &[],
                view.stamp.revision.0 as f64,
            );
            let held = view.held.map_or(0, |held| held.removes);
            out.gauge("holdfast_node_held_removals", "Removals that wait to be confirmed", &[], held as f64);
        }
        let pulse = *self.pulse.borrow();
        let age = now_ms().saturating_sub(pulse.passed_ms);
        let (age_name, age_help) = (
            "holdfast_node_supervisor_age_seconds",
            "Time since the agent's loop last came round; 10 s when idle",
        );
        out.gauge(age_name, age_help, &[], age as f64 / 1_000.0);
        let (pass_name, pass_help) =
            ("holdfast_node_supervisor_pass_seconds", "How long its last round took");
        out.gauge(pass_name, pass_help, &[], pulse.pass.as_secs_f64());
        out.counter(
            "holdfast_node_supervisor_passes",
            "Rounds of the agent's loop",
            &[],
            pulse.passes as f64,
        );
    }
}

fn vm(
    out: &mut Exposition,
    id: InstanceId,
    seen: &InstanceView,
    spec: Option<&NodeInstance>,
    logs: Option<&RingStats>,
    traffic: Option<Traffic>,
) {
    let id = id.to_string();
    let name = |part: fn(&NodeInstance) -> String| spec.map(part).unwrap_or_default();
    let [org, app, env, process] = [
        name(|s| s.org.to_string()),
        name(|s| s.app.to_string()),
        name(|s| s.env.to_string()),
        name(|s| s.process.to_string()),
    ];
    let labels: [(&'static str, &str); 5] =
        [("instance_id", &id), ("org", &org), ("app", &app), ("env", &env), ("process", &process)];
    let [a, b, c, d, e] = labels;
    out.gauge(
        "holdfast_node_vm_state",
        "1 for the state in which the instance is",
        &[a, b, c, d, e, ("state", state(seen))],
        1.0,
    );
    let restarts = f64::from(seen.observed.restarts);
    out.counter("holdfast_node_vm_restarts", "Restarts by this node", &labels, restarts);
    out.counter(
        "holdfast_node_vm_oom_kills",
        "Ends because memory was used up, seen by this agent",
        &labels,
        seen.oom_kills as f64,
    );
    if let Some(spec) = spec {
        let limit = mib(need(spec).0);
        out.gauge(
            "holdfast_node_vm_memory_limit_bytes",
            "Memory of the guest and its VMM at most",
            &labels,
            limit,
        );
    }
    if let Some(used) = seen.machine.and_then(|(pid, _)| process_of(pid)) {
        out.counter("holdfast_node_vm_cpu_seconds", "CPU time of the VMM and its guest", &labels, used.cpu_s);
        out.gauge(
            "holdfast_node_vm_resident_bytes",
            "Resident memory of the VMM and its guest",
            &labels,
            used.resident_bytes,
        );
    }
    if let Some(traffic) = traffic {
        // What the host's end receives the guest has sent.
        out.counter(
            "holdfast_node_vm_network_sent_bytes",
            "Bytes that the guest sent",
            &labels,
            traffic.received as f64,
        );
        out.counter(
            "holdfast_node_vm_network_received_bytes",
            "Bytes that the guest was sent",
            &labels,
            traffic.sent as f64,
        );
    }
    if let Some(logs) = logs {
        out.gauge("holdfast_node_vm_log_bytes", "Bytes of its log on disk", &labels, logs.bytes as f64);
        out.counter("holdfast_node_vm_log_lines", "Lines stored by this agent", &labels, logs.lines as f64);
        out.counter(
            "holdfast_node_vm_log_lines_dropped",
            "Lines lost before they could be stored",
            &labels,
            logs.dropped as f64,
        );
        out.counter(
            "holdfast_node_vm_log_lines_evicted",
            "Lines removed to keep within bounds",
            &labels,
            logs.evicted as f64,
        );
    }
}

fn state(seen: &InstanceView) -> &'static str {
    use holdfast_model::resource::InstanceState;
    match seen.observed.observation(InstanceId::from_bits(0)).state {
        InstanceState::Booting => "booting",
        InstanceState::Ready => "ready",
        InstanceState::Draining => "draining",
        InstanceState::Stopped => "stopped",
        InstanceState::Failed => "failed",
    }
}

fn mib(mib: u64) -> f64 {
    mib as f64 * 1_048_576.0
}

fn cores(milli: u64) -> f64 {
    milli as f64 / 1_000.0
}

fn process_of(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Process { cpu_s: cpu_s(&stat)?, resident_bytes: resident_bytes(&status)? })
}

/// User and system time of `/proc/PID/stat`, in seconds. The name before them may hold anything.
fn cpu_s(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let ticks = |field: Option<&str>| field?.parse::<u64>().ok();
    let (user, system) = (ticks(fields.next())?, ticks(fields.next())?);
    Some((user + system) as f64 / TICKS_PER_S)
}

fn resident_bytes(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib as f64 * 1_024.0)
}

/// By interface, of `/proc/net/dev`.
fn traffic(dev: &str) -> BTreeMap<String, Traffic> {
    let line = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let mut counts = counts.split_ascii_whitespace().map(|count| count.parse().ok());
        let received = counts.next()??;
        let sent = counts.nth(7)??;
        Some((name.trim().to_owned(), Traffic { received, sent }))
    };
    dev.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let stat = "77 (a b) c) S 1 77 77 0 -1 4194560 500 0 0 0 250 50 0 0 20 0 3 0 100 1000 200 18446744073709551615";
        assert_eq!(cpu_s(stat), Some(3.0));
        assert_eq!(cpu_s("77 (x"), None);
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t    2048 kB\n"), Some(2_097_152.0));
        assert_eq!(resident_bytes("Name:\tx\n"), None, "a process that has ended");
        let dev = "Inter-|   Receive |  Transmit\n face |bytes packets\n  lo: 1 2 3 4 5 6 7 8 9 10\nhf0:11 0 0 0 0 0 0 0 22 0\n";
        let traffic = traffic(dev);
        assert_eq!(traffic["hf0"], Traffic { received: 11, sent: 22 });
        assert_eq!(traffic.len(), 2);
        let own = process_of(std::process::id()).unwrap();
        assert!(own.resident_bytes > 100_000.0, "{own:?}");
    }
}

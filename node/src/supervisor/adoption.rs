//! Taking over what an earlier agent left: its records, and the machines that run.
//!
//! Nothing that runs and may run is touched (I7); what a record says was to be gone is ended.

use std::sync::Arc;

use holdfast_client::View;
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;

use super::{Supervisor, SupervisorError};
use crate::executor::ExecutorError;
use crate::host;
use crate::logs::chain;
use crate::machine::{Brief, now_ms};
use crate::phase::{Observed, Phase};
use crate::vmm::Vm;

impl Supervisor {
    /// Takes over what an earlier agent left: its records, and the machines that run.
    pub(super) async fn adopt(&mut self) -> Result<(), SupervisorError> {
        let (state, executor) = (Arc::clone(&self.state), Arc::clone(&self.executor));
        let boot_id = host::boot_id().map_err(SupervisorError::BootId)?;
        let read = tokio::task::spawn_blocking(move || -> Result<_, SupervisorError> {
            Ok((state.load()?, state.host_restarted(&boot_id)?, executor.scan()?))
        });
        let (records, host_restarted, mut found) = read.await.map_err(|_| SupervisorError::Thread)??;
        let now_ms = now_ms();
        self.observed = records;
        for id in found.machines.keys() {
            // Its record is lost; what its guest says will tell the rest.
            self.observed
                .entry(*id)
                .or_insert_with(|| Observed { phase: Phase::Booting, ..Observed::default() });
        }
        let view = self.view();
        let ids: Vec<InstanceId> = self.observed.keys().copied().collect();
        for id in ids {
            let Some(observed) = self.observed.get_mut(&id) else { continue };
            let before = observed.clone();
            let machine = found.machines.remove(&id);
            observed.recover(machine.is_some(), host_restarted, now_ms);
            if *observed != before {
                self.dirty.insert(id);
            }
            let Some(vm) = machine else { continue };
            if observed.may_run() {
                tracing::info!(instance = %id, pid = vm.pid(), "adopted a microVM that runs");
                let spec = view.as_ref().and_then(|view| view.items.get(&id)).cloned();
                self.watch(id, vm, spec.as_deref());
            } else {
                tracing::info!(instance = %id, "ending a microVM that was to be gone");
                vm.kill().await.map_err(ExecutorError::from)?;
            }
        }
        Ok(())
    }

    /// Watches a machine that an earlier agent started.
    fn watch(&mut self, id: InstanceId, vm: Vm, spec: Option<&NodeInstance>) {
        let (config, root) = spec.and_then(|spec| self.executor.watched(spec)).unzip();
        let phase = self.observed.get(&id).map(|seen| seen.phase);
        let ready = phase == Some(Phase::Ready);
        let runs = !matches!(phase, Some(Phase::Booting) | None);
        self.attach(id, vm, |brief| Brief { config, root, runs, ready, ..brief }, spec);
    }

    /// A machine that was adopted while it was unknown what it is for is watched anew once that is known.
    pub(super) fn recognise(&mut self, view: Option<&View<NodeInstance>>) {
        let Some(view) = view else { return };
        let strangers: Vec<InstanceId> = self
            .slots
            .iter()
            .filter(|(id, slot)| slot.machine.is_some() && !slot.known && view.items.contains_key(id))
            .map(|(id, _)| *id)
            .collect();
        for id in strangers {
            match self.executor.adopt(id) {
                Ok(Some(vm)) => self.watch(id, vm, view.items.get(&id).map(Arc::as_ref)),
                // Its end is told by whoever watches it.
                Ok(None) => {}
                Err(error) => tracing::warn!(instance = %id, error = %chain(&error), "not recognised"),
            }
        }
    }
}

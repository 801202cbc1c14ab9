//! Taking over what an earlier agent left: its records, and the machines that run.
//!
//! Nothing that runs and may run is touched (I7); what a record says was to be gone is ended.

use std::sync::Arc;

use holdfast_client::View;
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;

use super::host::Host;
use super::{Supervisor, SupervisorError};
use crate::logs::chain;
use crate::machine::now_ms;
use crate::phase::{Observed, Phase};

impl<H: Host> Supervisor<H> {
    /// Takes over what an earlier agent left: its records, and the machines that run.
    pub(super) async fn adopt(&mut self) -> Result<(), SupervisorError> {
        let (state, host) = (Arc::clone(&self.state), Arc::clone(&self.host));
        let boot_id = host.boot_id().map_err(SupervisorError::BootId)?;
        let read = self.host.on_disk(move || -> Result<_, SupervisorError> {
            Ok((state.load()?, state.host_restarted(&boot_id)?, state.is_cut_off()?, host.scan()?))
        });
        let (records, host_restarted, is_cut_off, mut found) =
            read.await.map_err(|_| SupervisorError::Thread)??;
        let now_ms = now_ms();
        self.observed = records;
        self.is_cut_off = is_cut_off;
        if is_cut_off {
            // Before anything else: a host that was booted has made no TAP, but an agent may have.
            self.host.isolate().await?;
        }
        for id in found.keys() {
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
            let machine = found.remove(&id);
            observed.recover(machine.is_some(), host_restarted, now_ms);
            if *observed != before {
                self.dirty.insert(id);
            }
            let Some(running) = machine else { continue };
            if observed.may_run() {
                tracing::info!(instance = %id, "adopted a microVM that runs");
                let spec = view.as_ref().and_then(|view| view.items.get(&id)).cloned();
                self.attach(id, running, spec.as_deref());
            } else if !is_cut_off {
                tracing::info!(instance = %id, "ending a microVM that was to be gone");
                self.host.kill(running).await?;
            }
        }
        Ok(())
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
            match self.host.adopt(id) {
                Ok(Some(running)) => self.attach(id, running, view.items.get(&id).map(Arc::as_ref)),
                // Its end is told by whoever watches it.
                Ok(None) => {}
                Err(error) => tracing::warn!(instance = %id, error = %chain(&error), "not recognised"),
            }
        }
    }
}

//! Orgs, apps and envs.

use super::admission::{app, cluster_only, sees};
use super::{Decision, Refusal, absent, exec, expect_version, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::Views;
use crate::volume_snapshot_views::SnapshotViews as _;
use holdfast_model::resource::{App, Env, Org};
use holdfast_model::{Aggregate, AppId, AppName, Code, EnvId, EnvName, EventPayload, OrgId, OrgName, Output};

fn taken(what: &str, name: &str) -> Refusal {
    refuse(Code::NameTaken, format!("There is {what} called «{name}» already: choose another name."))
}

pub(super) fn create_org(draft: &mut Draft<'_>, name: &OrgName) -> Decision {
    cluster_only(draft, "cluster")?;
    if draft.org_by_name(name)?.is_some() {
        return Err(taken("an org", name.as_str()));
    }
    let id = OrgId::from_bits(draft.fresh_id());
    let org = Org { id, name: name.clone(), version: 1, created_at: draft.context().now };
    draft.emit(Filing::org(Aggregate::Org(id), id), EventPayload::OrgCreated(org))?;
    Ok(Output::Org(id))
}

pub(super) fn create_app(draft: &mut Draft<'_>, org: OrgId, name: &AppName) -> Decision {
    if !sees(draft, org) || draft.org(org)?.is_none() {
        return Err(absent("org"));
    }
    if draft.app_by_name(org, name)?.is_some() {
        return Err(taken("an app", name.as_str()));
    }
    let id = AppId::from_bits(draft.fresh_id());
    let app = App { id, org, name: name.clone(), version: 1, created_at: draft.context().now };
    draft.emit(Filing::org(Aggregate::App(id), org), EventPayload::AppCreated(app))?;
    Ok(Output::App(id))
}

pub(super) fn create_env(draft: &mut Draft<'_>, of: AppId, name: &EnvName) -> Decision {
    let app = app(draft, of)?;
    if draft.env_by_name(of, name)?.is_some() {
        return Err(taken("an env", name.as_str()));
    }
    let id = EnvId::from_bits(draft.fresh_id());
    let env = Env {
        id,
        app: of,
        org: app.org,
        name: name.clone(),
        releases: 0,
        deployments: 0,
        current: None,
        last_good: None,
        version: 1,
        created_at: draft.context().now,
    };
    draft.emit(Filing::org(Aggregate::Env(id), app.org), EventPayload::EnvCreated(env))?;
    Ok(Output::Env(id))
}

pub(super) fn delete_app(draft: &mut Draft<'_>, id: AppId, expected_version: Option<u64>) -> Decision {
    let app = app(draft, id)?;
    expect_version(expected_version, app.version)?;
    if let Some(volume) = draft.org_volumes(app.org)?.iter().find(|volume| volume.app == id) {
        let message = format!(
            "The app has the volume «{}»: scale the process that mounts it to 0 and delete the volume first.",
            volume.name
        );
        return Err(refuse(Code::FailedPrecondition, message));
    }
    if let Some(snapshot) = draft.org_snapshots(app.org)?.iter().find(|snapshot| snapshot.app == id) {
        let message = format!(
            "The app has the snapshot {} of the volume «{}»: delete its snapshots first.",
            snapshot.id, snapshot.name
        );
        return Err(refuse(Code::FailedPrecondition, message));
    }
    exec::end_all_of_app(draft, id)?;
    super::secrets::forget_app(draft, id)?;
    draft.emit(Filing::org(Aggregate::App(id), app.org), EventPayload::AppDeleted { app: id })?;
    Ok(Output::None)
}

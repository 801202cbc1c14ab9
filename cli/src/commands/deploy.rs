//! `holdfast deploy`: a release from the manifest, rolled out, and watched until it serves.

use crate::args::tenant::Deploy;
use crate::commands::{image, rollout};
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::Manifest;
use holdfast_model::api::{CreateDeployment, CreateRelease};
use holdfast_model::limits::MANIFEST_BYTES_MAX;
use std::io::Read;
use std::path::Path;

pub(crate) async fn run(session: &Session, arguments: Deploy) -> Result<(), Failure> {
    let text = read(&arguments.file)?;
    let manifest = holdfast_model::manifest::parse(&text)
        .map_err(|why| Failure::Manifest { path: arguments.file.clone(), why })?;
    let reference = arguments.image.as_ref().or(manifest.image.as_ref()).ok_or_else(|| {
        Failure::Usage(format!(
            "{} names no image; add `[image] ref = …` or name one with --image.",
            arguments.file.display()
        ))
    })?;
    let app = session.app_called(session.app_named().unwrap_or(manifest.app.as_str())).await?;
    if app.name != manifest.app {
        return Err(Failure::Usage(format!(
            "The manifest is for app {}, not {}; deploy it to its own app.",
            manifest.app, app.name
        )));
    }
    check_counts(&manifest, &arguments)?;
    let env = session.env_of(&app).await?;
    let image = image::resolve(session, app.id, reference).await?;
    let body = CreateRelease { image, manifest: text };
    let release = session.client.create_release(env.id, &body).await?.item;
    session
        .output
        .remark(format!("Release {} of {}/{}: {}", release.number, app.name, env.name, release.image));
    let body = CreateDeployment { release: release.id, counts: arguments.counts.iter().cloned().collect() };
    let deployment = session.client.deploy(env.id, &body).await?.item;
    rollout::finish(session, deployment, arguments.wait).await
}

/// Says so before anything is made: the API would refuse it after the release exists.
fn check_counts(manifest: &Manifest, arguments: &Deploy) -> Result<(), Failure> {
    let unknown = arguments.counts.iter().find(|(process, _)| !manifest.processes.contains_key(process));
    match unknown {
        Some((process, _)) => Err(Failure::Usage(format!(
            "{} has no process {process}; it has {}.",
            arguments.file.display(),
            manifest.processes.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        ))),
        None => Ok(()),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let file = std::fs::File::open(path).map_err(Failure::file("read", path))?;
    let mut text = String::new();
    // One byte more than allowed, so that a longer file is refused as such.
    file.take(MANIFEST_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)
        .map_err(Failure::file("read", path))?;
    Ok(text)
}

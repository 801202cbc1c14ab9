//! `holdfast env`: where an app is deployed.

use crate::args::tenant::EnvCommand;
use crate::failure::Failure;
use crate::output::{age, or_dash, table};
use crate::session::Session;
use holdfast_model::api::CreateEnv;
use holdfast_model::resource::Env;

pub(crate) async fn run(session: &Session, command: EnvCommand) -> Result<(), Failure> {
    let app = session.app().await?;
    match command {
        EnvCommand::Create { name } => {
            let made = session.client.create_env(app.id, &CreateEnv { name }).await?;
            session
                .output
                .show(&made, || format!("Env {}/{} is made: {}", app.name, made.item.name, made.item.id))
        }
        EnvCommand::List => {
            let envs = session.client.envs(app.id, None).await?;
            session
                .output
                .show(&envs.items, || table(["NAME", "ID", "DEPLOYMENT", "AGE"], envs.items.iter().map(row)))
        }
    }
}

fn row(env: &Env) -> [String; 4] {
    [env.name.to_string(), env.id.to_string(), or_dash(env.current), age(env.created_at)]
}

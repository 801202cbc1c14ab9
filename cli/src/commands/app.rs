//! `holdfast app`: what is deployed.

use crate::args::tenant::AppCommand;
use crate::failure::Failure;
use crate::output::{age, table};
use crate::session::Session;
use holdfast_model::api::CreateApp;
use holdfast_model::resource::App;

pub(crate) async fn run(session: &Session, command: AppCommand) -> Result<(), Failure> {
    match command {
        AppCommand::Create { name } => {
            let org = session.org().await?;
            let made = session.client.create_app(org.id, &CreateApp { name }).await?;
            session.output.show(&made, || format!("App {} is made: {}", made.item.name, made.item.id))
        }
        AppCommand::List => {
            let org = session.org().await?;
            let apps = session.client.apps(org.id, None).await?;
            session.output.show(&apps.items, || table(["NAME", "ID", "AGE"], apps.items.iter().map(row)))
        }
        AppCommand::Delete { app } => {
            let app = session.app_called(&app).await?;
            session.confirmed(&format!("Delete app {} with everything in it?", app.name))?;
            let done = session.client.delete_app(app.id, app.version).await?;
            session.output.show(&done, || format!("App {} is deleted.", app.name))
        }
    }
}

fn row(app: &App) -> [String; 3] {
    [app.name.to_string(), app.id.to_string(), age(app.created_at)]
}

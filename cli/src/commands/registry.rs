//! `holdfast registry`: credentials for private registries, sealed like secrets.

use crate::args::tenant::RegistryCommand;
use crate::commands::secret_text;
use crate::failure::Failure;
use crate::output::{age, table};
use crate::session::Session;
use holdfast_model::api::SetRegistryCredential;
use holdfast_model::sealed::CredentialOwner;
use holdfast_model::secrets::SecretValue;

/// An app's, if one is named; else its org's.
async fn owner(session: &Session) -> Result<CredentialOwner, Failure> {
    match session.app_named() {
        Some(_) => Ok(CredentialOwner::App(session.app().await?.id)),
        None => Ok(CredentialOwner::Org(session.org().await?.id)),
    }
}

pub(crate) async fn run(session: &Session, command: RegistryCommand) -> Result<(), Failure> {
    let owner = owner(session).await?;
    match command {
        RegistryCommand::Set { host, user, password_file } => {
            let password = secret_text::read(password_file.as_deref(), "password", session.no_input())?;
            let value = |text: &str| SecretValue::new(text.as_bytes().to_vec().into());
            let body = SetRegistryCredential { host, user: value(&user), password: value(&password) };
            let made = session.client.set_registry_credential(owner, &body).await?.item;
            session.output.show(&made, || format!("The credential for {} is kept.", made.host))
        }
        RegistryCommand::List => {
            let found = session.client.registry_credentials(owner).await?.items;
            session.output.show(&found, || {
                let rows = found.iter().map(|c| [c.host.to_string(), c.actor.to_string(), age(c.created_at)]);
                table(["REGISTRY", "WHO", "AGE"], rows)
            })
        }
        RegistryCommand::Delete { host } => {
            let done = session.client.delete_registry_credential(owner, &host).await?;
            session.output.show(&done, || format!("The credential for {host} is forgotten."))
        }
    }
}

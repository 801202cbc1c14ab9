//! `holdfast secrets`: what workloads need and nobody should see. Values come from a file or standard input, never from
//! an argument, and are printed by `show` alone.

use crate::args::tenant::{Roll, SecretsCommand, SecretsShow};
use crate::commands::secret_text;
use crate::failure::{Failure, with_sources};
use crate::output::{age, table};
use crate::session::Session;
use holdfast_model::SecretKey;
use holdfast_model::api::{Answer, RevealSecrets, RollBackSecrets, SetSecrets};
use holdfast_model::limits::{SECRET_VALUE_BYTES_MAX, SECRETS_FILE_BYTES_MAX};
use holdfast_model::sealed::{SecretCause, SecretVersion};
use holdfast_model::secrets::{Bundle, SecretValue};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) async fn run(session: &Session, command: SecretsCommand) -> Result<(), Failure> {
    match command {
        SecretsCommand::Set { key, file, roll } => {
            let no_input = session.no_input();
            let value =
                secret_text::read_raw(file.as_deref(), key.as_str(), no_input, SECRET_VALUE_BYTES_MAX)?;
            let set = BTreeMap::from([(key, SecretValue::new(value))]);
            change(session, SetSecrets { set, unset: BTreeSet::new(), replace: false, roll: roll.rolls() })
                .await
        }
        SecretsCommand::Delete { keys, roll } => {
            let unset = keys.into_iter().collect();
            change(session, SetSecrets { set: BTreeMap::new(), unset, replace: false, roll: roll.rolls() })
                .await
        }
        SecretsCommand::Import { file, keep, roll } => {
            let text = secret_text::read_raw(
                file.as_deref(),
                "file of secrets",
                session.no_input(),
                2 * SECRETS_FILE_BYTES_MAX,
            )?;
            let bundle =
                Bundle::import(&text).map_err(|e| Failure::Usage(format!("It was not imported: {e}.")))?;
            let set = bundle.into_map();
            change(session, SetSecrets { set, unset: BTreeSet::new(), replace: !keep, roll: roll.rolls() })
                .await
        }
        SecretsCommand::Rollback { version, roll } => {
            let env = session.env().await?;
            let body = RollBackSecrets { to: version, roll: roll.rolls() };
            let made = session.client.roll_back_secrets(env.id, &body).await?;
            say(session, &made, roll)
        }
        SecretsCommand::List { version } => list(session, version).await,
        SecretsCommand::Versions => versions(session).await,
        SecretsCommand::Show(arguments) => show(session, arguments).await,
    }
}

async fn change(session: &Session, body: SetSecrets) -> Result<(), Failure> {
    let env = session.env().await?;
    let made = session.client.set_secrets(env.id, &body).await?;
    say(session, &made, Roll { no_roll: !body.roll })
}

fn say(session: &Session, made: &Answer<SecretVersion>, roll: Roll) -> Result<(), Failure> {
    session.output.show(&made.item, || {
        let then = if roll.rolls() { "what runs is rolled to it" } else { "the next deployment gets it" };
        format!("Version {} has {} secrets; {then}.", made.item.number, made.item.secrets.len())
    })
}

async fn list(session: &Session, version: Option<u32>) -> Result<(), Failure> {
    let env = session.env().await?;
    let found = match (session.client.secrets(env.id, version).await, version) {
        (Ok(found), _) => Some(found.item),
        // An env without secrets is no failure.
        (Err(error), None) if error.code() == "not_found" => None,
        (Err(error), _) => return Err(error.into()),
    };
    let secrets: BTreeMap<_, _> = found.iter().flat_map(|v| &v.secrets).collect();
    session.output.show(&found, || {
        let rows = secrets.iter().map(|(key, meta)| [key.to_string(), meta.changed_in.to_string()]);
        table(["KEY", "CHANGED IN"], rows)
    })
}

async fn versions(session: &Session) -> Result<(), Failure> {
    let env = session.env().await?;
    let mut versions = session.client.secret_versions(env.id).await?.items;
    versions.reverse();
    session
        .output
        .show(&versions, || table(["VERSION", "SECRETS", "BY", "WHO", "AGE"], versions.iter().map(row)))
}

fn row(version: &SecretVersion) -> [String; 5] {
    let cause = match version.cause {
        SecretCause::Set => "set".to_owned(),
        SecretCause::Import => "import".to_owned(),
        SecretCause::Rollback { to } => format!("rollback to {to}"),
    };
    [
        version.number.to_string(),
        version.secrets.len().to_string(),
        cause,
        version.actor.to_string(),
        age(version.created_at),
    ]
}

async fn show(session: &Session, arguments: SecretsShow) -> Result<(), Failure> {
    let env = session.env().await?;
    let keys: BTreeSet<SecretKey> = arguments.keys.into_iter().collect();
    let asked = RevealSecrets { version: arguments.version, keys };
    let revealed = session.client.reveal_secrets(env.id, &asked).await?.item;
    session.output.remark("That these were shown stands in the history.");
    if session.output.json {
        return session.output.show(&revealed, String::new);
    }
    let mut bundle = Bundle::default();
    for (key, value) in revealed.secrets {
        bundle.add(key, value).map_err(|e| Failure::Host(with_sources(&e)))?;
    }
    let file = bundle.to_file();
    session.output.show(&(), || String::from_utf8_lossy(&file).into_owned())
}

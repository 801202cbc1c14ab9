//! `holdfast login`: checks a token against the cluster and remembers both.

use crate::args::{Global, tenant};
use crate::commands::{ca, secret_text};
use crate::failure::Failure;
use crate::login::Login;
use crate::output::Output;
use crate::session;
use std::path::PathBuf;

pub(crate) async fn run(global: &Global, arguments: tenant::Login) -> Result<(), Failure> {
    let output = Output::new(global.json);
    let path: PathBuf = session::login_path(global)?;
    let token = secret_text::read(arguments.token_file.as_deref(), "token", global.no_input)?;
    let ca_pem = match (&arguments.ca_file, &arguments.ca_pin) {
        (Some(file), _) => std::fs::read_to_string(file).map_err(Failure::file("read", file))?,
        (None, Some(pin)) => ca::fetch(&arguments.server, pin).await?,
        (None, None) => {
            return Err(Failure::Usage("Name the cluster's CA with --ca-file or --ca-pin.".into()));
        }
    };
    let mut login = Login { servers: arguments.server, ca_pem, token, org: None };
    let who = session::client(&login)?.whoami().await?;
    login.org = global.org.clone().or_else(|| who.item.org.as_ref().map(ToString::to_string));
    login.save(&path)?;
    output.show(&who, || {
        let place = login.org.as_ref().map_or_else(|| "every org".to_owned(), |org| format!("org {org}"));
        format!("Logged in as {} for {place}; kept in {}.", who.item.token.name, path.display())
    })
}

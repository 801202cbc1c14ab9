//! A command's hold on the cluster: the login, the client, and from names to ids.

use crate::args::Global;
use crate::failure::{Failure, with_sources};
use crate::login::{self, Login};
use crate::output::Output;
use holdfast_client::{Client, Endpoint, EndpointError};
use holdfast_identity::{CaCertificate, Token};
use holdfast_model::resource::{App, Env, Org};
use std::path::PathBuf;
use std::time::Duration;

/// How long a person waits for an answer, over every member and a change of leader.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What a command that talks to the cluster works with.
pub(crate) struct Session {
    /// The API.
    pub(crate) client: Client,
    /// How to print.
    pub(crate) output: Output,
    login: Login,
    global: Global,
}

impl Session {
    /// Opens the login that the flags, the environment or the default name.
    pub(crate) fn open(global: &Global) -> Result<Self, Failure> {
        let login = Login::load(&login_path(global)?)?;
        Ok(Self {
            client: client(&login)?.with_deadline(ANSWER_MAX),
            output: Output::new(global.json),
            login,
            global: global.clone(),
        })
    }

    /// The org that is named, or that the login works in, or the only one that it sees.
    pub(crate) async fn org(&self) -> Result<Org, Failure> {
        let named = self.global.org.as_ref().or(self.login.org.as_ref());
        let Some(name) = named else {
            let mut orgs = self.client.orgs(None).await?.items;
            return match (orgs.pop(), orgs.is_empty()) {
                (Some(org), true) => Ok(org),
                _ => Err(Failure::Unnamed { what: "org" }),
            };
        };
        if let Ok(id) = name.parse() {
            return Ok(self.client.org(id).await?.item);
        }
        let found = self.client.orgs(Some(name)).await?.items.into_iter().find(|o| o.name.as_str() == name);
        found.ok_or_else(|| Failure::NotFound { what: "org", name: name.clone() })
    }

    /// The app that is named.
    pub(crate) async fn app(&self) -> Result<App, Failure> {
        let name = self.global.app.as_ref().ok_or(Failure::Unnamed { what: "app" })?;
        self.app_called(name).await
    }

    /// The app with this name or id.
    pub(crate) async fn app_called(&self, name: &str) -> Result<App, Failure> {
        if let Ok(id) = name.parse() {
            return Ok(self.client.app(id).await?.item);
        }
        let org = self.org().await?;
        let found = self.client.apps(org.id, Some(name)).await?.items;
        let found = found.into_iter().find(|a| a.name.as_str() == name);
        found.ok_or_else(|| Failure::NotFound { what: "app", name: name.to_owned() })
    }

    /// The env that is named, or the app's only one.
    pub(crate) async fn env(&self) -> Result<Env, Failure> {
        if let Some(id) = self.global.env.as_ref().and_then(|name| name.parse().ok()) {
            return Ok(self.client.env(id).await?.item);
        }
        self.env_of(&self.app().await?).await
    }

    /// The env that is named within `app`, or its only one.
    pub(crate) async fn env_of(&self, app: &App) -> Result<Env, Failure> {
        let Some(name) = &self.global.env else {
            let mut envs = self.client.envs(app.id, None).await?.items;
            return match (envs.pop(), envs.is_empty()) {
                (Some(env), true) => Ok(env),
                _ => Err(Failure::Unnamed { what: "env" }),
            };
        };
        if let Ok(id) = name.parse() {
            return Ok(self.client.env(id).await?.item);
        }
        let found = self.client.envs(app.id, Some(name)).await?.items;
        let found = found.into_iter().find(|e| e.name.as_str() == name);
        found.ok_or_else(|| Failure::NotFound { what: "env", name: name.clone() })
    }

    /// Whether nobody may be asked.
    pub(crate) const fn no_input(&self) -> bool {
        self.global.no_input
    }

    /// What `--app` says.
    pub(crate) fn app_named(&self) -> Option<&str> {
        self.global.app.as_deref()
    }

    /// Whether to ask nothing.
    pub(crate) fn confirmed(&self, question: &str) -> Result<(), Failure> {
        if self.global.yes {
            return Ok(());
        }
        let asks = !self.global.no_input && std::io::IsTerminal::is_terminal(&std::io::stdin());
        if !asks {
            return Err(Failure::Usage(format!("{question} Say so with --yes.")));
        }
        eprint!("{question} [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map_err(Failure::file("read", "standard input"))?;
        if matches!(answer.trim(), "y" | "Y" | "yes") {
            Ok(())
        } else {
            Err(Failure::Usage("Nothing was done.".into()))
        }
    }
}

/// Where the login is.
pub(crate) fn login_path(global: &Global) -> Result<PathBuf, Failure> {
    global.context.clone().map_or_else(login::default_path, Ok)
}

/// A client with this login.
pub(crate) fn client(login: &Login) -> Result<Client, Failure> {
    let ca = CaCertificate::from_pem(&login.ca_pem).map_err(|e| Failure::Host(with_sources(&e)))?;
    let token = Token::parse(&login.token).map_err(|e| Failure::Usage(with_sources(&e)))?;
    Ok(Client::new(endpoints(&login.servers)?, &ca, Some(&token))?)
}

/// Addresses as they were given.
pub(crate) fn endpoints(servers: &[String]) -> Result<Vec<Endpoint>, Failure> {
    servers
        .iter()
        .map(|s| s.parse().map_err(|e| Failure::Usage(with_sources(&e as &EndpointError))))
        .collect()
}

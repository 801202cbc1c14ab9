//! `holdfast token`: what people and machines log in with.

use crate::args::tenant::{TokenCommand, TokenCreate};
use crate::commands::secret_text;
use crate::failure::Failure;
use crate::output::{age, table, time};
use crate::session::Session;
use holdfast_model::api::{CreateToken, TokenView};
use holdfast_model::resource::TokenKind;

pub(crate) async fn run(session: &Session, command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create(arguments) => create(session, arguments).await,
        TokenCommand::List => {
            let tokens = session.client.tokens().await?;
            session.output.show(&tokens.items, || {
                let header = ["NAME", "FOR", "SCOPES", "EXPIRES", "STATE", "ID", "AGE"];
                table(header, tokens.items.iter().map(row))
            })
        }
        TokenCommand::Revoke { token } => {
            let done = session.client.revoke_token(token).await?;
            session.output.show(&done, || format!("Token {token} is revoked."))
        }
    }
}

async fn create(session: &Session, arguments: TokenCreate) -> Result<(), Failure> {
    let org = if arguments.operator { None } else { Some(session.org().await?.id) };
    let body = CreateToken {
        name: arguments.name,
        org,
        role: arguments.role.map(Into::into),
        scopes: arguments.scopes.into_iter().collect(),
        ttl_s: arguments.ttl.as_secs(),
    };
    let made = session.client.create_token(&body).await?.item;
    if let Some(path) = &arguments.out {
        secret_text::write(path, &made.secret)?;
        return session
            .output
            .show(&made.token, || format!("Token {} is in {}.", made.token.name, path.display()));
    }
    session.output.remark(format!("Token {} is made; it is shown only this once:", made.token.name));
    session.output.show(&made, || made.secret.clone())
}

fn row(token: &TokenView) -> [String; 7] {
    let kind = match token.kind {
        TokenKind::Operator => "operator".into(),
        TokenKind::Org(org) => org.to_string(),
    };
    let scopes: Vec<_> = token.scopes.iter().map(|s| s.as_str()).collect();
    [
        token.name.to_string(),
        kind,
        if scopes.len() > 4 { format!("{} scopes", scopes.len()) } else { scopes.join(",") },
        time(token.expires_at),
        if token.revoked_at.is_some() { "revoked".into() } else { "active".into() },
        token.id.to_string(),
        age(token.created_at),
    ]
}

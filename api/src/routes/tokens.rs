//! Tokens: made, shown once, revoked at once (I11).

use super::apps::{org, vanished};
use crate::endpoint::{Endpoint, Need, PAGE, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, cut, done, found, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_identity::TokenKind as SecretKind;
use holdfast_model::api::{Answer, CreateToken, CreatedToken, Done, Page, TokenView, WhoAmI};
use holdfast_model::command::NewToken;
use holdfast_model::limits::TOKEN_MS_MAX;
use holdfast_model::resource::TokenKind;
use holdfast_model::{Code, Command, Digest, OrgId, Output, Role, Scope, ScopeSet, TokenId};
use holdfast_store::Views;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let tokens = "/v1/tokens";
    table.add(
        Endpoint::post(tokens, Need::Scope(Scope::OrgsAdmin), "Make a token; it is shown this once")
            .body::<CreateToken>()
            .answers::<Answer<CreatedToken>>(201),
        create,
    );
    table.add(
        Endpoint::get(tokens, Need::Scope(Scope::OrgsAdmin), "List tokens")
            .query(&TOKEN_PAGE)
            .reads()
            .answers::<Page<TokenView>>(200),
        list,
    );
    table.add(
        Endpoint::delete("/v1/tokens/{token}", Need::Scope(Scope::OrgsAdmin), "Revoke a token at once")
            .answers::<Done>(200),
        revoke,
    );
    table.add(
        Endpoint::get("/v1/whoami", Need::AnyToken, "Who the token is").answers::<Answer<WhoAmI>>(200),
        whoami,
    );
}

const TOKEN_PAGE: [(&str, &str); 3] =
    [PAGE[0], PAGE[1], ("org", "An org's tokens; without it the caller's own org's, or the operators'.")];

async fn create(call: Call, Body(body): Body<CreateToken>) -> Result<Response, Refusal> {
    let own = call.caller.token()?;
    let mut scopes: ScopeSet = body.role.map(Role::scopes).unwrap_or_default();
    scopes.extend(body.scopes.iter());
    if scopes.is_empty() {
        return Err(Refusal::invalid("A token needs a role or at least one scope."));
    }
    let (kind, secret_kind) = match body.org {
        Some(id) => {
            org(&call, &call.view().await?, id)?;
            (TokenKind::Org(id), SecretKind::Access)
        }
        None if own.kind == TokenKind::Operator => (TokenKind::Operator, SecretKind::Operator),
        None => return Err(Refusal::invalid("Name the org that the token is for.")),
    };
    let beyond: Vec<_> = scopes.without(own.scopes).iter().map(Scope::as_str).collect();
    if !beyond.is_empty() {
        let detail = format!("Nobody gives what they do not have: your token lacks {}.", beyond.join(", "));
        return Err(Refusal::new(Code::Forbidden, detail));
    }
    let ttl_ms = body.ttl_s.saturating_mul(1000);
    if ttl_ms == 0 || ttl_ms > TOKEN_MS_MAX {
        return Err(Refusal::invalid("`ttl_s` must be from 1 second to one year."));
    }
    let secret = call.service.seed.token(secret_kind, call.caller.request());
    let digest = Digest(*secret.digest().as_bytes());
    let command = Command::CreateToken(NewToken { name: body.name, digest, kind, scopes, ttl_ms });
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Token(id) = accepted.output else { return Err(vanished("token")) };
    let token = view.token(id)?.ok_or_else(|| vanished("token"))?;
    Ok(created(
        accepted.revision,
        CreatedToken { token: token.into(), secret: secret.reveal().as_str().to_owned() },
    ))
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let of = match call.query::<OrgId>("org")? {
        Some(id) => Some(org(&call, &view, id)?.id),
        None => call.caller.org(),
    };
    let items = view.tokens(of, call.query::<TokenId>("cursor")?, limit + 1)?;
    let (items, next) = cut(items, limit, |t| t.id.to_string());
    Ok(page(view.revision(), items.into_iter().map(TokenView::from).collect(), next))
}

async fn revoke(call: Call) -> Result<Response, Refusal> {
    let command = Command::RevokeToken { token: call.id("token", "token")? };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn whoami(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let token = call.caller.token()?.clone();
    let org = match token.kind {
        TokenKind::Org(id) => view.org(id)?.map(|o| o.name),
        TokenKind::Operator => None,
    };
    Ok(found(view.revision(), WhoAmI { token: token.into(), org, cluster: call.service.cluster }))
}

//! Bearer tokens: only their digests are here (I10).

use super::admission::{asking_token, sees};
use super::{Decision, absent, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::Views;
use holdfast_model::command::NewToken;
use holdfast_model::limits::TOKEN_MS_MAX;
use holdfast_model::resource::{Token, TokenKind};
use holdfast_model::{Aggregate, Code, EventPayload, OrgId, Output, TokenId};

fn owner(kind: TokenKind) -> Option<OrgId> {
    match kind {
        TokenKind::Operator => None,
        TokenKind::Org(org) => Some(org),
    }
}

fn filing(id: TokenId, org: Option<OrgId>) -> Filing {
    org.map_or(Filing::cluster(Aggregate::Token(id)), |org| Filing::org(Aggregate::Token(id), org))
}

pub(super) fn create(draft: &mut Draft<'_>, new: &NewToken) -> Decision {
    let org = owner(new.kind);
    let visible = match org {
        Some(org) => sees(draft, org) && draft.org(org)?.is_some(),
        None => draft.context().actor_org.is_none(),
    };
    if !visible {
        return Err(absent("org"));
    }
    // A tenant's token makes none that may do more than itself.
    if draft.context().actor_org.is_some() {
        let own = asking_token(draft)?.map(|t| t.scopes).unwrap_or_default();
        if let Some(beyond) = new.scopes.without(own).iter().next() {
            return Err(refuse(
                Code::Forbidden,
                format!(
                    "Your token does not carry «{beyond}», so it cannot hand it on: leave that scope out."
                ),
            ));
        }
    }
    Ok(Output::Token(issue(draft, new)?))
}

/// Makes a token whose owner was checked.
pub(super) fn issue(draft: &mut Draft<'_>, new: &NewToken) -> Result<TokenId, super::Refusal> {
    let now = draft.context().now;
    if new.ttl_ms == 0 || new.ttl_ms > TOKEN_MS_MAX {
        return Err(refuse(
            Code::InvalidRequest,
            "A token lasts between a millisecond and 366 days: give another duration.",
        ));
    }
    if draft.token_by_digest(&new.digest)?.is_some() {
        return Err(refuse(Code::InvalidRequest, "This token was used before: draw a fresh one."));
    }
    let id = TokenId::from_bits(draft.fresh_id());
    let token = Token {
        id,
        name: new.name.clone(),
        digest: new.digest,
        kind: new.kind,
        scopes: new.scopes,
        expires_at: now.plus_ms(new.ttl_ms),
        revoked_at: None,
        created_at: now,
    };
    draft.emit(filing(id, owner(new.kind)), EventPayload::TokenCreated(token))?;
    Ok(id)
}

pub(super) fn revoke(draft: &mut Draft<'_>, id: TokenId) -> Decision {
    let caller = draft.context().actor_org;
    let visible = |kind: TokenKind| caller.is_none() || owner(kind) == caller;
    let token = draft.token(id)?.filter(|t| visible(t.kind)).ok_or_else(|| absent("token"))?;
    if token.revoked_at.is_none() {
        draft.emit(filing(id, owner(token.kind)), EventPayload::TokenRevoked { token: id })?;
    }
    Ok(Output::None)
}

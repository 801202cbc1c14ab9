//! `holdfast server init`: a new cluster with its CA, its first member and its first operator.

use super::folder::{Folder, MemberFile, check_address};
use super::run::{cluster_version_max, start_consensus, wait_for_leader};
use crate::args::operator::ServerInit;
use crate::commands::secret_text;
use crate::failure::{Failure, with_sources};
use crate::output::Output;
use holdfast_api::service::{RequestInfo, entropy, now};
use holdfast_identity::{
    Authority, CERTIFICATE_VALIDITY, Credential, PrivateKey, Token, TokenKind as SecretKind,
};
use holdfast_model::command::{NewCluster, NewMember, NewToken};
use holdfast_model::limits::TOKEN_MS_MAX;
use holdfast_model::resource::{Member, TokenKind};
use holdfast_model::{ClusterId, Command, Context, Digest, Incarnation, MemberId, Proposal, Scope};
use holdfast_raft::{Consensus, MemberIdentity, MemberNode};
use serde::Serialize;
use std::time::SystemTime;

/// The first member's id.
const FIRST_MEMBER: MemberId = MemberId(1);

#[derive(Serialize)]
struct Made {
    cluster: ClusterId,
    member: MemberId,
    ca_pin: String,
    /// Shown this once; absent when it was written to a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

pub(crate) async fn init(output: &Output, arguments: ServerInit) -> Result<(), Failure> {
    check_address("--api-addr", &arguments.api_addr)?;
    check_address("--raft-addr", &arguments.raft_addr)?;
    let folder = Folder::make(&arguments.data_dir)?;
    let time = now();
    let cluster =
        ClusterId::from_bits((u128::from(time.0 & ((1 << 48) - 1)) << 80) | (entropy() & ((1 << 80) - 1)));
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let authority = Authority::create(&cluster.to_string(), SystemTime::now()).map_err(|e| host(&e))?;
    let member = MemberFile {
        cluster,
        member: FIRST_MEMBER,
        name: arguments.name,
        api_addr: arguments.api_addr,
        raft_addr: arguments.raft_addr,
    };
    folder.save_authority(&authority)?;
    folder.save_credential(&self_issued(&authority, &member)?)?;
    let identity = MemberIdentity { cluster: cluster.to_string(), member: FIRST_MEMBER, incarnation: 1 };
    Consensus::prepare(folder.path(), &identity).map_err(|e| host(&e))?;

    let token = Token::generate(SecretKind::Operator).map_err(|e| host(&e))?;
    let new = NewCluster {
        cluster,
        incarnation: Incarnation(1),
        member: NewMember {
            name: member.name.clone(),
            raft_addr: member.raft_addr.clone(),
            api_addr: member.api_addr.clone(),
        },
        operator: NewToken {
            name: "first-operator".parse().map_err(|e| host(&e))?,
            digest: Digest(*token.digest().as_bytes()),
            kind: TokenKind::Operator,
            scopes: Scope::ALL.iter().copied().collect(),
            ttl_ms: TOKEN_MS_MAX,
        },
    };
    let command = new.at(cluster_version_max()?);
    let consensus = start_consensus(&folder, &member).await?;
    let node = MemberNode { raft_addr: member.raft_addr.clone(), api_addr: member.api_addr.clone() };
    consensus.bootstrap(node).await.map_err(|e| host(&e))?;
    wait_for_leader(&consensus).await?;
    let outcome = consensus.propose(first_proposal(command)).await.map_err(|e| host(&e))?;
    outcome.map_err(|rejection| Failure::Host(rejection.message))?;
    consensus.shutdown().await;
    // The token reaches its file before the folder counts as made: no cluster without a way in.
    let shown = token.reveal();
    let made = Made {
        cluster,
        member: FIRST_MEMBER,
        ca_pin: authority.certificate().fingerprint().to_string(),
        token: arguments.token_file.is_none().then(|| shown.as_str().to_owned()),
    };
    if let Some(path) = &arguments.token_file {
        secret_text::write(path, &shown)?;
    }
    folder.finish(&member)?;
    output.remark("The operator's token is shown only this once; whoever has it runs the cluster.");
    output.show(&made, || {
        let token = made.token.as_deref().unwrap_or("written to the file");
        format!("cluster        {}\nCA pin         {}\noperator token {token}", made.cluster, made.ca_pin)
    })
}

/// The certificate that a member gives itself: every member holds the CA.
pub(super) fn self_issued(authority: &Authority, member: &MemberFile) -> Result<Credential, Failure> {
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let key = PrivateKey::generate().map_err(|e| host(&e))?;
    let request = key.signing_request().map_err(|e| host(&e))?;
    let subject = holdfast_api::member_subject(&Member {
        id: member.member,
        name: member.name.clone(),
        raft_addr: member.raft_addr.clone(),
        api_addr: member.api_addr.clone(),
        removed: false,
        created_at: now(),
    });
    let issued =
        authority.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()).map_err(|e| host(&e))?;
    Credential::new(key, &issued.chain_pem).map_err(|e| host(&e))
}

fn first_proposal(command: Command) -> Proposal {
    let request = RequestInfo::of_member(FIRST_MEMBER);
    let context = Context {
        actor: request.actor,
        actor_org: None,
        source: None,
        request_id: request.request_id,
        idempotency_key: None,
        now: request.now,
        entropy: request.entropy,
    };
    Proposal { context, command }
}

//! `holdfast server join`: a further member, by a one-time secret. The leader takes it into the group once it runs.

use super::folder::{Folder, MemberFile, check_address};
use crate::args::operator::ServerJoin;
use crate::commands::secret_text;
use crate::failure::{Failure, with_sources};
use crate::output::Output;
use holdfast_client::{Client, Endpoint};
use holdfast_identity::{Authority, Credential, Fingerprint, PrivateKey};
use holdfast_model::api::{Answer, Enrol, EnrolAnswer};
use holdfast_model::command::{Joiner, NewMember};
use holdfast_model::resource::Enrolled;
use holdfast_raft::{Consensus, MemberIdentity};
use serde::Serialize;

#[derive(Serialize)]
struct Joined {
    cluster: holdfast_model::ClusterId,
    member: holdfast_model::MemberId,
}

pub(crate) async fn join(output: &Output, no_input: bool, arguments: ServerJoin) -> Result<(), Failure> {
    check_address("--api-addr", &arguments.api_addr)?;
    check_address("--raft-addr", &arguments.raft_addr)?;
    let usage = |e: &dyn std::error::Error| Failure::Usage(with_sources(e));
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let pin: Fingerprint = arguments.join.ca_pin.parse().map_err(|e| usage(&e))?;
    let endpoints: Vec<Endpoint> =
        arguments.join.server.iter().map(|s| s.parse()).collect::<Result<_, _>>().map_err(|e| usage(&e))?;
    let secret = secret_text::read(arguments.join.secret_file.as_deref(), "one-time secret", no_input)?;
    let folder = Folder::make(&arguments.data_dir)?;
    let key = PrivateKey::generate().map_err(|e| host(&e))?;
    let joiner = NewMember {
        name: arguments.name.clone(),
        raft_addr: arguments.raft_addr.clone(),
        api_addr: arguments.api_addr.clone(),
    };
    let body = Enrol {
        secret: secret.as_str().to_owned(),
        csr_pem: key.signing_request().map_err(|e| host(&e))?,
        joiner: Joiner::Member(joiner),
    };
    let client = Client::first_contact(endpoints, pin)?;
    let answer: Answer<EnrolAnswer> = client.post("/v1/enrol", &body).await?;
    let answer = answer.item;
    let (Enrolled::Member(id), Some(ca_key)) = (answer.enrolled, answer.ca_key_pem.as_deref()) else {
        return Err(Failure::Host(
            "The cluster answered as if this were no member; nothing was kept.".into(),
        ));
    };
    let authority = Authority::from_pem(ca_key.as_bytes()).map_err(|e| host(&e))?;
    folder.save_authority(&authority)?;
    if let Some(keys) = &answer.sealing_keys {
        folder.sealing_keys()?.merge(keys.as_bytes()).map_err(|e| host(&e))?;
    }
    folder.save_credential(&Credential::new(key, &answer.certificate_pem).map_err(|e| host(&e))?)?;
    let identity =
        MemberIdentity { cluster: answer.cluster.to_string(), member: id, incarnation: answer.incarnation.0 };
    Consensus::prepare(folder.path(), &identity).map_err(|e| host(&e))?;
    folder.finish(&MemberFile {
        cluster: answer.cluster,
        member: id,
        name: arguments.name,
        api_addr: arguments.api_addr,
        raft_addr: arguments.raft_addr,
    })?;
    let joined = Joined { cluster: answer.cluster, member: id };
    output.show(&joined, || {
        format!(
            "Member {id} of {}. Run it: holdfast server run --data-dir {}",
            answer.cluster,
            folder.path().display()
        )
    })
}

//! `holdfast server invite`: a one-time secret with which a member, node or edge joins.

use crate::args::operator::Invite;
use crate::commands::members::enrolment_kind;
use crate::commands::secret_text;
use crate::failure::Failure;
use crate::output::word;
use crate::session::Session;
use holdfast_model::api::{CreateEnrolment, CreatedEnrolment};

pub(crate) async fn run(session: &Session, arguments: Invite) -> Result<(), Failure> {
    let body =
        CreateEnrolment { kind: enrolment_kind(&arguments)?, ttl_s: arguments.ttl.map(|t| t.as_secs()) };
    let made = session.client.create_enrolment(&body).await?.item;
    if let Some(path) = &arguments.out {
        secret_text::write(path, &made.secret)?;
        // The secret is in the file; the rest is for whoever runs `join`.
        let shown = CreatedEnrolment { secret: "[in the file]".into(), ..made };
        return session
            .output
            .show(&shown, || how_to_join(&shown, &format!("--secret-file {}", path.display())));
    }
    session.output.remark("The secret is shown only this once; it lets one machine in.");
    session.output.remark(how_to_join(&made, "--secret-file FILE"));
    session.output.show(&made, || made.secret.clone())
}

fn how_to_join(made: &CreatedEnrolment, secret: &str) -> String {
    let command = match word(&made.kind).as_str() {
        "member" | "learner" => "server join --api-addr HOST:PORT --raft-addr HOST:PORT".to_owned(),
        kind => format!("{kind} join"),
    };
    format!("holdfast {command} --data-dir FOLDER --name NAME --server URL --ca-pin {} {secret}", made.ca_pin)
}

//! `holdfast doctor`: what is wrong with this host, the cluster or the login. The host's part is the node's
//! (`holdfast_node::doctor`); here are login, certificates and members, and how all of it is shown.

use crate::agents::enrolled::Agent;
use crate::args::Global;
use crate::args::operator::Doctor;
use crate::failure::{Failure, with_sources};
use crate::login::Login;
use crate::output::{Output, table};
use crate::session;
use holdfast_client::ClientError;
use holdfast_model::Timestamp;
use holdfast_node::doctor::{Finding, Severity, judge, read};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long one member may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// A token that ends sooner is a warning.
const TOKEN_LIFE_WARN: Duration = Duration::from_secs(3 * 24 * 3_600);

const LOGIN_MEND: &str =
    "Run `holdfast login` with an address that a member listens on, the cluster's CA and a valid token.";

/// What is printed.
#[derive(Serialize)]
struct Report {
    /// The worst of them.
    worst: Severity,
    findings: Vec<Finding>,
}

/// Looks, tells, and fails if anything is amiss that keeps instances from running or apart.
pub(crate) async fn run(global: &Global, output: Output, arguments: Doctor) -> Result<(), Failure> {
    let data_dir = arguments.data_dir.as_deref();
    let mut findings = Vec::new();
    if !arguments.cluster {
        // It runs tools and walks through /proc: off the one thread that the members' answers need later.
        let folder = arguments.data_dir.clone();
        let looked =
            tokio::task::spawn_blocking(move || judge(&read(Path::new("/"), folder.as_deref()))).await;
        findings = looked.map_err(|e| Failure::Host(format!("The host could not be looked at: {e}.")))?;
        findings.extend(data_dir.map(|folder| certificate(folder, SystemTime::now())));
    }
    if !arguments.host {
        findings.extend(cluster(global).await);
    }
    let worst = findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok);
    let report = Report { worst, findings };
    output.show(&report, || text(&report.findings))?;
    let failed = report.findings.iter().filter(|finding| finding.severity == Severity::Fail).count();
    if failed == 0 { Ok(()) } else { Err(Failure::Unwell { failed }) }
}

/// A table of what was looked at, and below it what is not well and how to mend it.
fn text(findings: &[Finding]) -> String {
    let rows = findings.iter().map(|finding| {
        [
            finding.severity.as_str().to_owned(),
            finding.id.to_owned(),
            finding.seen.replace(char::is_control, " "),
        ]
    });
    let mut parts = vec![table(["", "CHECK", "SEEN"], rows)];
    let unwell = findings.iter().filter(|finding| !finding.mend.is_empty());
    parts.extend(unwell.map(|finding| {
        let means = if finding.means.is_empty() { String::new() } else { format!("{}\n  ", finding.means) };
        format!("{} ({})\n  {means}{}", finding.id, finding.severity.as_str(), finding.mend)
    }));
    parts.join("\n\n")
}

/// The certificate of the agent in this folder.
fn certificate(folder: &Path, now: SystemTime) -> Finding {
    let id = "certificate";
    let mend = "Let the agent run where it reaches a member: it renews its certificate by itself. One that has ended needs a new enrolment: `holdfast server invite node`, and join again.";
    let agent = match Agent::load(folder) {
        Ok(agent) => agent,
        Err(error) => {
            let means = "No agent can run from this folder.";
            return Finding::new(
                id,
                Severity::Fail,
                with_sources(&error),
                means,
                "Join as a node: `holdfast node join --help`.",
            );
        }
    };
    let facts = agent.credential.facts();
    let until = humantime::format_rfc3339_seconds(facts.not_after);
    if now > facts.not_after {
        let means = "No member lets this agent in. What runs here goes on, and learns of no change.";
        return Finding::new(id, Severity::Fail, format!("ended at {until}"), means, mend);
    }
    if now > facts.renew_at() {
        let means = "It should have been renewed by now; when it ends no member lets this agent in.";
        return Finding::new(id, Severity::Warn, format!("ends at {until}"), means, mend);
    }
    Finding::ok(id, format!("valid until {until}"))
}

/// The login, and each member that it names.
async fn cluster(global: &Global) -> Vec<Finding> {
    let path = match session::login_path(global) {
        Ok(path) => path,
        Err(error) => return vec![Finding::unknown("login", with_sources(&error), LOGIN_MEND)],
    };
    let login = match Login::load(&path) {
        Ok(login) => login,
        Err(Failure::NoLogin { path }) => {
            let seen = format!("there is no login in {}, so no member was asked", path.display());
            return vec![Finding::unknown("login", seen, LOGIN_MEND)];
        }
        // A file that others can read is refused like one that is no login, and says which of the two it is.
        Err(error) => {
            let means = "No command can use this login.";
            return vec![Finding::new("login", Severity::Fail, with_sources(&error), means, LOGIN_MEND)];
        }
    };
    let mut findings = vec![Finding::ok("login", format!("{}, mode 0600", path.display()))];
    let mut token = None;
    let (mut answered, mut first) = (0_usize, None);
    for server in &login.servers {
        let alone = Login { servers: vec![server.clone()], ..login.clone() };
        let asked = match session::client(&alone) {
            Ok(client) => client.with_deadline(ANSWER_MAX).whoami().await.map_err(Failure::from),
            Err(error) => Err(error),
        };
        match asked {
            Ok(answer) => {
                answered += 1;
                token = Some(Ok(answer.item.token.expires_at));
            }
            // It answered, and said no: that is the token's fault and not the member's.
            Err(Failure::Api(ClientError::Api(problem))) if matches!(problem.status, 401 | 403) => {
                answered += 1;
                token.get_or_insert(Err(problem.detail));
            }
            Err(error) => {
                first.get_or_insert(format!("{server}: {}", with_sources(&error)));
            }
        }
    }
    findings.push(members(answered, login.servers.len(), first));
    findings.push(standing(token, SystemTime::now()));
    findings
}

/// What became of asking each member.
fn members(answered: usize, all: usize, first: Option<String>) -> Finding {
    let id = "members";
    let mend = "Check that the members run, that their addresses in the login are right, and that nothing on the way drops TCP to them. A name or CA that does not fit is a login for another cluster.";
    match first {
        None => Finding::ok(id, format!("{answered} of {all} answer")),
        Some(first) if answered == 0 => {
            let means = "No command reaches the cluster. Edges and nodes go on with what they know.";
            Finding::new(id, Severity::Fail, format!("none of {all} answers, as {first}"), means, mend)
        }
        Some(first) => {
            let means = "Commands use the others; the cluster has less to lose.";
            Finding::new(id, Severity::Warn, format!("{answered} of {all} answer; not {first}"), means, mend)
        }
    }
}

/// How the token stands: when it ends, or why it is refused.
fn standing(token: Option<Result<Timestamp, String>>, now: SystemTime) -> Finding {
    let id = "token";
    let mend = "Get another one: `holdfast token create`, then `holdfast login`.";
    match token {
        None => Finding::unknown(id, "no member answered, so nobody said whether it is valid", ""),
        Some(Err(why)) => {
            Finding::new(id, Severity::Fail, why, "The cluster does not accept this login's token.", mend)
        }
        Some(Ok(expires_at)) => {
            let ends = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(expires_at.0));
            let seen = format!("valid until {}", crate::output::time(expires_at));
            match ends.map(|ends| ends.duration_since(now).unwrap_or_default()) {
                Some(left) if left < TOKEN_LIFE_WARN => {
                    Finding::new(id, Severity::Warn, seen, "Soon no command will be accepted any more.", mend)
                }
                _ => Finding::ok(id, seen),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_how_to_mend_what_is_not_well() {
        let findings = [
            Finding::ok("kvm", "/dev/kvm can be used"),
            Finding::new("ksm", Severity::Fail, "merged\u{1b}[2J", "It leaks.", "Switch it off."),
            Finding::unknown("login", "there is none", "Log in."),
        ];
        let expected = "         CHECK  SEEN
ok       kvm    /dev/kvm can be used
fail     ksm    merged [2J
unknown  login  there is none

ksm (fail)
  It leaks.
  Switch it off.

login (unknown)
  Log in.";
        assert_eq!(text(&findings), expected);
    }

    #[test]
    fn members_that_do_not_answer_are_named() {
        let silent = || Some("https://10.0.0.2:7443: refused".to_owned());
        assert_eq!(members(3, 3, None).severity, Severity::Ok);
        assert_eq!(members(2, 3, silent()).severity, Severity::Warn);
        let none = members(0, 3, silent());
        assert!(none.severity == Severity::Fail && none.seen.contains("10.0.0.2"), "{none:?}");
    }

    #[test]
    fn a_token_is_refused_ends_soon_or_is_well() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let ends = |seconds: u64| Some(Ok(Timestamp((1_000_000 + seconds) * 1_000)));
        assert_eq!(standing(None, now).severity, Severity::Unknown);
        assert_eq!(standing(Some(Err("revoked".into())), now).severity, Severity::Fail);
        assert_eq!(standing(ends(60), now).severity, Severity::Warn);
        assert_eq!(standing(ends(30 * 24 * 3_600), now).severity, Severity::Ok);
        // One that never ends.
        assert_eq!(standing(Some(Ok(Timestamp(u64::MAX))), now).severity, Severity::Ok);
    }

    #[tokio::test]
    async fn i10_a_login_that_others_can_read_is_a_failure() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("context.json");
        let global = Global {
            json: false,
            verbose: 0,
            no_input: true,
            yes: false,
            org: None,
            app: None,
            env: None,
            context: Some(path.clone()),
        };
        let severity = |findings: &[Finding]| findings[0].severity;
        assert_eq!(severity(&cluster(&global).await), Severity::Unknown);
        std::fs::write(&path, "{}").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let findings = cluster(&global).await;
        assert!(
            severity(&findings) == Severity::Fail && findings[0].seen.contains("chmod 600"),
            "{findings:?}"
        );
    }

    #[test]
    fn a_folder_without_an_agent_has_no_certificate() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(certificate(folder.path(), SystemTime::now()).severity, Severity::Fail);
    }
}

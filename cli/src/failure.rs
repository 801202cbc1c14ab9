//! How a command fails: one sentence, a hint where there is one, and an exit code that scripts can rely on.

use holdfast_client::{ClientError, exit};
use holdfast_model::Code;
use holdfast_model::exec::ExecEnd;
use std::path::PathBuf;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No login.
    #[error("There is no login in {}.", path.display())]
    NoLogin {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Something has to be named.
    #[error("Which {what}? None is named.")]
    Unnamed {
        /// The kind of thing, as its flag is called.
        what: &'static str,
    },
    /// It is not there, or may not be seen.
    #[error("There is no {what} «{name}».")]
    NotFound {
        /// The kind of thing.
        what: &'static str,
        /// What was asked for.
        name: String,
    },
    /// The cluster said no, or could not be reached.
    #[error("{}", api_sentence(.0))]
    Api(#[from] ClientError),
    /// A file could not be used.
    #[error("Cannot {doing} {}: {source}.", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The manifest is wrong.
    #[error("{}: {why}.", path.display())]
    Manifest {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: holdfast_model::manifest::ManifestError,
    },
    /// The roll-out did not get there.
    #[error("{0}")]
    RollOut(String),
    /// A snapshot or a restore came to nothing.
    #[error("{0}")]
    Backup(String),
    /// It was watched for as long as was asked.
    #[error("{what} is not done after {}.", humantime::format_duration(*after))]
    WaitTimedOut {
        /// What was watched.
        what: String,
        /// For how long.
        after: std::time::Duration,
    },
    /// Not everything that was asked for could be had.
    #[error("Not every line could be had: {0}")]
    Incomplete(String),
    /// What was to be verified is not what it says it is.
    #[error("{0}")]
    NotAuthentic(String),
    /// What an agent or a member of this host did failed.
    #[error("{0}")]
    Host(String),
    /// The doctor found something that must be mended.
    #[error("{failed} {} failed; see above what each means and how to mend it.", if *failed == 1 { "check" } else { "checks" })]
    Unwell {
        /// How many.
        failed: usize,
    },
    /// A program in an instance ended with this code.
    #[error("The program ended with exit code {code}.")]
    Program {
        /// The code.
        code: u8,
    },
    /// An exec session ended without its program's doing.
    #[error("{reason}")]
    Exec {
        /// How.
        end: ExecEnd,
        /// A sentence.
        reason: String,
    },
    /// Standard output is closed.
    #[error("Cannot write to standard output: {0}.")]
    Output(std::io::Error),
}

impl Failure {
    /// A failure to do something with a file.
    pub(crate) fn file(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { doing, path, source }
    }

    /// The exit code (SPEC, CLI).
    pub(crate) fn exit(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Unnamed { .. } | Self::Manifest { .. } => exit::USAGE,
            Self::NoLogin { .. } => exit::AUTHENTICATION,
            Self::NotFound { .. } => exit::NOT_FOUND,
            Self::Api(error) => error.exit_code(),
            Self::WaitTimedOut { .. } | Self::Incomplete(_) => exit::TRANSIENT,
            Self::Program { code } => *code,
            Self::Exec { end: ExecEnd::Revoked, .. } => exit::AUTHENTICATION,
            Self::Exec { end: ExecEnd::Refused, .. } => exit::CONFLICT,
            Self::Exec { end: ExecEnd::Lost | ExecEnd::ConnectTimeout, .. } => exit::TRANSIENT,
            Self::Exec { .. } => exit::FAILURE,
            Self::File { .. }
            | Self::RollOut(_)
            | Self::Backup(_)
            | Self::NotAuthentic(_)
            | Self::Host(_)
            | Self::Unwell { .. }
            | Self::Output(_) => exit::FAILURE,
        }
    }

    /// Whether the same may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        self.exit() == exit::TRANSIENT
    }

    /// What to do about it, where the sentence does not say so.
    pub(crate) fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoLogin { .. } => {
                "Run `holdfast login`, or name a context file with --context or HOLDFAST_CONTEXT.".into()
            }
            Self::Unnamed { what } => {
                format!("Name it with --{what} or HOLDFAST_{}.", what.to_uppercase())
            }
            Self::NotFound { what, .. } => {
                format!("`holdfast {what} list` shows those that your login may see.")
            }
            Self::WaitTimedOut { .. } => {
                "It goes on by itself; `holdfast deployments` and `holdfast instances` show how it stands."
                    .into()
            }
            Self::RollOut(_) => {
                "`holdfast instances --all` says why instances failed; `holdfast logs --all` what they wrote."
                    .into()
            }
            Self::Api(error) => return api_hint(error),
            _ => return None,
        })
    }

    /// The stable code, for scripts.
    pub(crate) fn code(&self) -> String {
        match self {
            Self::Usage(_) => "usage".into(),
            Self::NoLogin { .. } => "no_login".into(),
            Self::Unnamed { .. } => "unnamed".into(),
            Self::NotFound { .. } => Code::NotFound.as_str().into(),
            Self::Api(error) => error.code().into(),
            Self::File { .. } => "file".into(),
            Self::Manifest { .. } => Code::InvalidManifest.as_str().into(),
            Self::RollOut(_) => "rollout_failed".into(),
            Self::Backup(_) => "backup_failed".into(),
            Self::WaitTimedOut { .. } => "wait_timed_out".into(),
            Self::Incomplete(_) => "incomplete".into(),
            Self::NotAuthentic(_) => "not_authentic".into(),
            Self::Host(_) => "host".into(),
            Self::Unwell { .. } => "unwell".into(),
            Self::Program { .. } => "program_failed".into(),
            Self::Exec { end, .. } => format!("exec_{end}"),
            Self::Output(_) => "output".into(),
        }
    }

    /// Whether nobody is left to tell: the reader of our output went away, as in `holdfast events | head`.
    pub(crate) fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe)
    }
}

fn api_sentence(error: &ClientError) -> String {
    match error {
        ClientError::Api(problem) if !problem.detail.is_empty() => problem.detail.clone(),
        other => with_sources(other),
    }
}

/// An error and what caused it, in one line: no error's text repeats its source's.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{}: {cause_text}", text.trim_end_matches('.'));
        }
        source = cause.source();
    }
    text
}

fn api_hint(error: &ClientError) -> Option<String> {
    let ClientError::Api(problem) = error else {
        return error
            .is_retryable()
            .then(|| "Check that the cluster runs and that the login's addresses are right.".into());
    };
    Some(match problem.status {
        401 => "Your token is unknown, revoked or over; get another one and run `holdfast login`.".into(),
        403 if problem.code == Code::Forbidden.as_str() => {
            "Ask for a token with that scope: `holdfast token create --help` lists them.".into()
        }
        500 => format!("This is a defect of ours; please report it with request id {}.", problem.request_id),
        _ if problem.retryable => "Nothing may have changed; the same command can be run again.".into(),
        _ => return None,
    })
}

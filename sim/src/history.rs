//! The clients' history and its judgement: is there one order of all requests, in keeping with time, that explains every
//! answer (I3)? The checker is `todc-utils`'s, after Wing, Gong and Lowe.

use std::collections::BTreeMap;

use holdfast_model::Revision;
use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History};
use todc_utils::specifications::Specification;

use crate::client::{Answer, Name, Question, Thing};

/// One request, from its first word to its answer.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) name: Name,
    pub(crate) question: Question,
    /// Counts what happens in the run; gives the order of calls and answers.
    pub(crate) called: u64,
    /// When it was answered, and what; a request without an answer may have been carried out.
    pub(crate) answered: Option<(u64, Answer)>,
}

/// What a request did to a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Created(Thing),
    Taken,
    Deleted(Thing),
    Absent(Thing),
    Found(Option<Thing>),
}

struct Register;

impl Specification for Register {
    type State = Option<Thing>;
    type Operation = Step;

    fn init() -> Self::State {
        None
    }

    fn apply(step: &Step, state: &Self::State) -> (bool, Self::State) {
        match step {
            Step::Created(id) => (state.is_none(), Some(*id)),
            Step::Taken => (state.is_some(), *state),
            Step::Deleted(id) => (*state == Some(*id), None),
            Step::Absent(id) => (*state != Some(*id), *state),
            Step::Found(found) => (state == found, *state),
        }
    }
}

fn step(question: &Question, answer: Answer) -> Option<Step> {
    match (question, answer) {
        (Question::Create(_) | Question::Claim(..), Answer::Created(id, _)) => Some(Step::Created(id)),
        (Question::Create(_) | Question::Claim(..), Answer::Taken) => Some(Step::Taken),
        (Question::Delete(id, _), Answer::Deleted(_)) => Some(Step::Deleted(*id)),
        (Question::Delete(id, _), Answer::Absent) => Some(Step::Absent(*id)),
        (Question::Read, Answer::Found(found, _)) => Some(Step::Found(found)),
        _ => None,
    }
}

/// When a request was called or answered, which, and what it did.
type Moment = (u64, usize, Action<Step>);

/// Judges a history. Every request must have its answer; the run waits for that.
pub(crate) fn judge(history: &[Asked]) -> Result<(), String> {
    order_of_revisions(history)?;
    let mut names: BTreeMap<&Name, Vec<Moment>> = BTreeMap::new();
    for (number, asked) in history.iter().enumerate() {
        let Some((at, answer)) = asked.answered else { continue };
        if matches!(asked.question, Question::StaleRead) {
            continue;
        }
        let step = step(&asked.question, answer).ok_or_else(|| {
            format!("request {number} got {answer:?}, which is no answer to {:?}", asked.question)
        })?;
        let actions = names.entry(&asked.name).or_default();
        actions.push((asked.called, number, Action::Call(step)));
        actions.push((at, number, Action::Response(step)));
    }
    for (name, mut actions) in names {
        actions.sort_by_key(|(at, _, _)| *at);
        let actions = actions.into_iter().map(|(_, number, action)| (number, action)).collect();
        if !WGLChecker::<Register>::is_linearizable(History::from_actions(actions)) {
            return Err(format!("I3: the history of the name {name} is not linearizable"));
        }
    }
    Ok(())
}

/// A request that began after another was answered sees at least that one's revision.
fn order_of_revisions(history: &[Asked]) -> Result<(), String> {
    let revision = |answer: Answer| match answer {
        Answer::Created(_, revision) | Answer::Deleted(revision) | Answer::Found(_, revision) => {
            Some(revision)
        }
        Answer::Taken | Answer::Absent => None,
    };
    let mut answers: Vec<(u64, Revision)> = history
        .iter()
        .filter_map(|asked| asked.answered)
        .filter_map(|(at, a)| Some((at, revision(a)?)))
        .collect();
    answers.sort();
    let mut highest = Revision(0);
    for (_, revision) in &mut answers {
        highest = highest.max(*revision);
        *revision = highest;
    }
    for asked in history {
        let Some((_, answer)) = asked.answered else { continue };
        // A stale read may be of any time; `checks` holds it against the history.
        if matches!(asked.question, Question::StaleRead) {
            continue;
        }
        let Some(own) = revision(answer) else { continue };
        let before = answers.partition_point(|(at, _)| *at < asked.called);
        let known = before.checked_sub(1).map_or(Revision(0), |last| answers[last].1);
        let repeats_a_write = asked.question.writes();
        if own < known || (repeats_a_write && own == known) {
            return Err(format!(
                "I3: revision {known} was answered before a request began that then got revision {own}: {:?} of {}",
                asked.question, asked.name
            ));
        }
    }
    Ok(())
}

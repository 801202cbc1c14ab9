//! Log time: how long the cluster has had a leader, as the leaders measured it. What is kept for a while is kept by it,
//! so that no member's wall clock can end it early (I4).

use super::{Decision, refuse};
use crate::error::StoreError;
use crate::overlay::Draft;
use crate::rows::{Rows, RowsMut};
use crate::tables::{Table, decode, encode, key};
use crate::views::Views;
use holdfast_model::limits::LOG_TIME_STEP_MS_MAX;
use holdfast_model::{Code, Output};

/// Only the clockwork asks for this: see `admission`.
pub(super) fn advance(draft: &mut Draft<'_>, by_ms: u64) -> Decision {
    if !draft.cluster_version()?.has_log_time() {
        return Err(refuse(
            Code::FailedPrecondition,
            "This cluster version has no log time: raise the version.",
        ));
    }
    if by_ms > LOG_TIME_STEP_MS_MAX {
        return Err(refuse(
            Code::InvalidRequest,
            format!("Log time advances by at most {LOG_TIME_STEP_MS_MAX} ms at a time."),
        ));
    }
    let now = of(draft)?.saturating_add(by_ms);
    draft.put(key(Table::LogTime, &[]), Some(encode(Table::LogTime, &now)?))?;
    Ok(Output::None)
}

/// The log time of a state, in milliseconds; 0 where it never advanced.
pub(crate) fn of(rows: &(impl Rows + ?Sized)) -> Result<u64, StoreError> {
    let value = rows.get(&key(Table::LogTime, &[]))?;
    value.map_or(Ok(0), |bytes| decode(Table::LogTime, &bytes))
}

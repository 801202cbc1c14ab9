//! Opening the log: what lies in its journal is taken over, and what the file then holds is read and checked.
//!
//! Keeps I2: nothing that is missing or fails its checksum is skipped, and a journal that may hold what was acknowledged is
//! never given up.

use openraft::entry::RaftEntry;
use redb::{Database, ReadableDatabase, ReadableTable, Table};

use crate::log_journal::{Frame, Journal, JournalPlace, JournalRow};
use crate::log_record::{self, Place};
use crate::log_store::{
    ENTRIES, LogStoreError, META, META_COMMITTED, META_IDENTITY, META_JOURNAL, META_PURGED, META_VOTE,
};
use crate::log_view::LogView;
use crate::member_identity::MemberIdentity;
use crate::types::{LogId, Vote};

/// Opens the journal, and takes what lies in it over into the log. In the same transaction the log says from now on that
/// entries may lie beside it.
pub(crate) fn take_over(
    database: &Database,
    place: JournalPlace,
    new_identity: Option<&MemberIdentity>,
) -> Result<Journal, LogStoreError> {
    let transaction = database.begin_write()?;
    let mut journal;
    let row;
    {
        let mut entries = transaction.open_table(ENTRIES)?;
        let mut meta = transaction.open_table(META)?;
        let frames;
        (journal, frames) = Journal::open(place, row_of(&meta, META_JOURNAL)?)?;
        let purged: Option<LogId> = row_of(&meta, META_PURGED)?;
        let last = entries.last()?.map(|(key, _)| key.value()).max(purged.as_ref().map(LogId::index));
        let mut next = last.map(|last| last + 1);
        for Frame { entries: found, committed } in frames {
            for (index, record) in found {
                if next.is_some_and(|next| next != index) {
                    let first = next.unwrap_or(index);
                    return Err(LogStoreError::Hole { index: first, first, last: index });
                }
                entries.insert(index, record.as_slice())?;
                next = Some(index + 1);
            }
            if let Some(committed) = committed {
                meta.insert(META_COMMITTED, committed.as_slice())?;
            }
        }
        let identity = match new_identity {
            Some(identity) => Some(identity.clone()),
            None => row_of(&meta, META_IDENTITY)?,
        };
        row = journal.next_row(true);
        write_rows(&mut meta, identity.as_ref(), &row)?;
    }
    transaction.commit()?;
    journal.begin(row);
    Ok(journal)
}

/// Writes what the log says of its journal, also where a build that knows none looks.
pub(crate) fn write_rows(
    meta: &mut Table<'_, &'static str, &'static [u8]>,
    identity: Option<&MemberIdentity>,
    row: &JournalRow,
) -> Result<(), LogStoreError> {
    if let Some(identity) = identity {
        let record = log_record::encode_identity(Place::Meta(META_IDENTITY), identity, row.open)?;
        meta.insert(META_IDENTITY, record.as_slice())?;
    }
    let record = log_record::encode(Place::Meta(META_JOURNAL), row)?;
    meta.insert(META_JOURNAL, record.as_slice())?;
    Ok(())
}

/// What a log file was found to hold.
pub(crate) struct Recovered {
    /// The readers' view of it.
    pub(crate) view: LogView,
    /// Whose it is.
    pub(crate) identity: Option<MemberIdentity>,
    /// Entries up to here are purged and were not all deleted.
    pub(crate) purge_backlog: Option<u64>,
}

impl Recovered {
    /// Reads the meta rows and both ends of the log, and checks that nothing is missing between them.
    pub(crate) fn read(database: &Database) -> Result<Self, LogStoreError> {
        let transaction = database.begin_read()?;
        let entries = transaction.open_table(ENTRIES)?;
        let meta = transaction.open_table(META)?;
        let vote: Option<Vote> = row_of(&meta, META_VOTE)?;
        #[cfg(feature = "planted-bugs")]
        let vote = vote.filter(|_| !crate::planted::is(crate::planted::Bug::ForgetVote));
        let committed: Option<LogId> = row_of(&meta, META_COMMITTED)?;
        let purged: Option<LogId> = row_of(&meta, META_PURGED)?;
        let identity = row_of(&meta, META_IDENTITY)?;
        let mut last = purged;
        let mut purge_backlog = None;
        if let (Some((first_key, _)), Some((last_key, last_value))) = (entries.first()?, entries.last()?) {
            let (first_index, last_index) = (first_key.value(), last_key.value());
            let purged_through = purged.as_ref().map(LogId::index);
            if purged_through.is_some_and(|through| first_index <= through) {
                purge_backlog = purged_through;
            }
            if purged_through.is_none_or(|through| last_index > through) {
                last = Some(log_record::decode_entry(last_index, last_value.value())?.log_id());
                let expected_first = purged_through.map_or(first_index, |through| through + 1);
                let present = entries.range(expected_first..)?.count() as u64;
                if present != last_index + 1 - expected_first {
                    return Err(LogStoreError::Hole {
                        index: expected_first,
                        first: expected_first,
                        last: last_index,
                    });
                }
            }
        }
        Ok(Recovered { view: LogView::recovered(vote, committed, purged, last), identity, purge_backlog })
    }
}

fn row_of<T: serde::de::DeserializeOwned>(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &'static str,
) -> Result<Option<T>, LogStoreError> {
    match meta.get(key)? {
        Some(value) => Ok(Some(log_record::decode(Place::Meta(key), value.value())?)),
        None => Ok(None),
    }
}

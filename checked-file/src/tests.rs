use std::fs;
use std::path::Path;

use holdfast_faulty_disk::Disk;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redb::{Database, ReadableDatabase, StorageBackend, TableDefinition};

use super::*;

const ROWS: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("rows");

fn value(key: u64) -> Vec<u8> {
    key.to_le_bytes().repeat(40)
}

fn fill(database: &Database, keys: std::ops::Range<u64>) {
    let transaction = database.begin_write().unwrap();
    {
        let mut rows = transaction.open_table(ROWS).unwrap();
        for key in keys {
            rows.insert(key, value(key).as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
}

/// Every row that is answered is right; the error is that of the first that is not answered.
fn read_all(database: &Database, keys: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_read()?;
    let rows = transaction.open_table(ROWS)?;
    for key in 0..keys {
        let found = rows.get(key)?;
        let found = found.unwrap_or_else(|| panic!("row {key} is not there and nobody noticed"));
        assert_eq!(found.value(), value(key), "row {key} is wrong and nobody noticed");
    }
    Ok(())
}

fn open(path: &Path) -> Result<(Database, Checks), DatabaseError> {
    let checked = Checked::open(path)?;
    let checks = checked.checks();
    Ok((redb::Builder::new().set_cache_size(0).create_with_backend(checked)?, checks))
}

fn scrub_all(checks: &Checks) -> io::Result<()> {
    let mut next = Some(0);
    while let Some(from) = next {
        next = checks.scrub(from)?;
    }
    Ok(())
}

#[test]
fn i01_rot_in_a_closed_file_is_never_read_as_data() {
    const KEYS: u64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.redb");
    fill(&open(&path).unwrap().0, 0..KEYS);
    let (good, sums) = (fs::read(&path).unwrap(), fs::read(sidecar_of(&path)).unwrap());
    let mut noticed = 0;
    for seed in 0..150 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bad = good.clone();
        let at = rng.random_range(0..bad.len());
        bad[at] ^= 1 << rng.random_range(0..8);
        fs::write(&path, &bad).unwrap();
        fs::write(sidecar_of(&path), &sums).unwrap();
        match open(&path) {
            Err(_) => noticed += 1,
            Ok((database, checks)) => {
                let read = read_all(&database, KEYS);
                let scrubbed = scrub_all(&checks);
                assert!(scrubbed.as_ref().err().is_none_or(|error| is_rot(error)), "{scrubbed:?}");
                // The block may have been written over with what is right before anybody read it.
                assert!(read.is_ok() || checks.rot().is_some());
                noticed += u32::from(checks.rot().is_some());
            }
        }
    }
    // The others hit blocks that were never written.
    assert!(noticed > 110, "only {noticed} of 150 rotten bits were noticed");
}

#[test]
fn i01_rot_under_a_running_process_is_never_read_as_data() {
    const KEYS: u64 = 600;
    for seed in 0..60 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = Disk::default();
        let checked = Checked::over(disk.clone());
        let checks = checked.checks();
        let told = Arc::new(OnceLock::new());
        let hears = told.clone();
        checks.on_rot(move |rot| drop(hears.set(rot.clone())));
        let database = redb::Builder::new().set_cache_size(0).create_with_backend(checked).unwrap();
        fill(&database, 0..KEYS);
        // Blocks that were never written are known from now on too.
        scrub_all(&checks).unwrap();
        let at = rng.random_range(0..disk.len().unwrap());
        disk.flip_bit(at, rng.random_range(0..8));
        let read = read_all(&database, KEYS);
        assert_eq!(read.is_err(), told.get().is_some());
        let error = scrub_all(&checks).unwrap_err();
        assert!(is_rot(&error), "{error:?}");
        assert_eq!(checks.rot().unwrap().offset, at / BLOCK_BYTES * BLOCK_BYTES);
    }
}

#[test]
fn checksums_follow_writes_of_any_place_and_length() {
    for seed in 0..40 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let checked = Checked::over(Disk::default());
        let mut model: Vec<u8> = Vec::new();
        for _ in 0..120 {
            match rng.random_range(0..4) {
                0 => {
                    model.resize(rng.random_range(0..40_000), 0);
                    checked.set_len(model.len() as u64).unwrap();
                }
                1 if !model.is_empty() => {
                    let from = rng.random_range(0..model.len());
                    let data = vec![rng.random(); rng.random_range(1..=model.len() - from)];
                    model[from..from + data.len()].copy_from_slice(&data);
                    checked.write(from as u64, &data).unwrap();
                }
                _ if !model.is_empty() => {
                    let from = rng.random_range(0..model.len());
                    let mut out = vec![0; rng.random_range(1..=model.len() - from)];
                    checked.read(from as u64, &mut out).unwrap();
                    assert_eq!(out, model[from..from + out.len()]);
                }
                _ => {}
            }
        }
        assert!(checked.read(model.len() as u64, &mut [0]).is_err(), "read beyond the end");
    }
}

#[test]
fn a_file_of_checksums_is_believed_only_when_it_is_whole_and_nothing_was_written_since() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.redb");
    let sums = sidecar_of(&path);
    fill(&open(&path).unwrap().0, 0..50);
    assert!(sums.exists());
    let (database, _) = open(&path).unwrap();
    fill(&database, 50..60);
    assert!(!sums.exists(), "it says what the file held before");
    drop(database);
    let good = fs::read(&sums).unwrap();
    let length = fs::metadata(&path).unwrap().len();
    assert!(sidecar::read(&sums, length).unwrap().is_some());
    assert!(sidecar::read(&sums, length + 1).unwrap().is_none());
    for position in 0..good.len() {
        let mut bad = good.clone();
        bad[position] ^= 1;
        fs::write(&sums, &bad).unwrap();
        assert!(sidecar::read(&sums, length).unwrap().is_none(), "byte {position}");
    }
    read_all(&open(&path).unwrap().0, 60).unwrap();
}

#[test]
fn a_file_that_another_process_has_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.redb");
    let first = open(&path).unwrap();
    assert!(matches!(open(&path), Err(DatabaseError::DatabaseAlreadyOpen)));
    read_all(&first.0, 0).unwrap_err();
}

/// What a failed sync left is not what the disk has. No checksums say otherwise afterwards, and the next process looks at
/// all of it.
#[test]
fn i02_a_file_whose_sync_failed_is_closed_without_checksums() {
    let dir = tempfile::tempdir().unwrap();
    for fails in [false, true] {
        let (disk, sums) = (Disk::default(), dir.path().join(format!("{fails}.sums")));
        let not_there = AtomicBool::new(false);
        let checked = Checked::new(Box::new(disk.clone()), Vec::new(), Some(sums.clone()), not_there, None);
        let database = Database::builder().create_with_backend(checked).unwrap();
        fill(&database, 0..10);
        if fails {
            disk.fail_next_sync();
            let transaction = database.begin_write().unwrap();
            transaction.open_table(ROWS).unwrap().insert(10, value(10).as_slice()).unwrap();
            transaction.commit().unwrap_err();
        }
        drop(database);
        assert_eq!(sums.exists(), !fails);
        let durable = Checked::over(Disk::of(disk.image().synced()));
        let database = Database::builder().create_with_backend(durable).unwrap();
        read_all(&database, 10).unwrap();
    }
}

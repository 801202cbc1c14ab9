use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

type Rows = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

fn write(rows: &Rows) -> (Vec<u8>, Summary) {
    let mut bytes = Vec::new();
    let mut writer = SnapshotWriter::new(&mut bytes).unwrap();
    for ((table, key), value) in rows {
        writer.row(*table, key, value).unwrap();
    }
    let summary = writer.finish().unwrap();
    (bytes, summary)
}

fn read(mut bytes: &[u8]) -> Result<(Rows, Summary), SnapshotError> {
    let mut reader = SnapshotReader::new(&mut bytes)?;
    let mut rows = Rows::new();
    while let Some(chunk) = reader.next_chunk()? {
        for (key, value) in chunk.rows() {
            rows.insert((chunk.table, key.to_vec()), value.to_vec());
        }
    }
    Ok((rows, reader.summary().unwrap()))
}

/// Three chunks: one row is longer than a chunk.
fn sample() -> Rows {
    let mut rows = Rows::new();
    for n in 0..20u8 {
        rows.insert((1, vec![n]), vec![n; 300]);
    }
    rows.insert((2, b"long".to_vec()), vec![7; CHUNK_BYTES + 1]);
    rows.insert((2, b"longer".to_vec()), vec![8; 10]);
    rows
}

#[test]
fn what_is_written_is_read() {
    for rows in [Rows::new(), sample()] {
        let (bytes, summary) = write(&rows);
        let (back, seen) = read(&bytes).unwrap();
        assert_eq!(back, rows);
        assert_eq!(seen, summary);
        assert_eq!(summary.bytes, bytes.len() as u64);
    }
}

#[test]
fn i14_every_truncation_is_refused() {
    let rows = Rows::from([((1, vec![1]), vec![1; 40]), ((2, vec![1]), vec![2; 40])]);
    let (bytes, _) = write(&rows);
    for end in 0..bytes.len() {
        assert!(read(&bytes[..end]).is_err(), "cut at {end}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(read(&longer).is_err());
}

#[test]
fn i14_every_flipped_bit_is_refused() {
    let rows = Rows::from([((1, vec![1]), vec![1; 40]), ((2, vec![1]), vec![2; 40])]);
    let (bytes, _) = write(&rows);
    for at in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        assert!(read(&damaged).is_err(), "bit {at}");
    }
}

#[test]
fn i14_reordered_dropped_and_foreign_parts_are_refused() {
    let rows = Rows::from([((1, vec![1]), vec![1; 40]), ((2, vec![1]), vec![2; 40])]);
    let (bytes, _) = write(&rows);
    let part = PART_HEADER_BYTES + 8 + 1 + 40 + DIGEST_BYTES;
    let (first, second) = (HEADER_BYTES..HEADER_BYTES + part, HEADER_BYTES + part..HEADER_BYTES + 2 * part);
    let end = &bytes[second.end..];
    let head = &bytes[..HEADER_BYTES];
    let swapped = [head, &bytes[second.clone()], &bytes[first.clone()], end].concat();
    assert!(matches!(read(&swapped), Err(SnapshotError::OutOfPlace { .. })));
    let dropped = [head, &bytes[first.clone()], end].concat();
    assert!(matches!(read(&dropped), Err(SnapshotError::OutOfPlace { .. })));
    let doubled = [head, &bytes[first.clone()], &bytes[first], &bytes[second], end].concat();
    assert!(matches!(read(&doubled), Err(SnapshotError::OutOfPlace { .. })));
    let mut foreign = bytes.clone();
    foreign[9] = 2;
    assert!(matches!(read(&foreign), Err(SnapshotError::ForeignVersion { found: 2 })));
    assert!(matches!(read(b"PK\x03\x04 something else"), Err(SnapshotError::NotASnapshot)));
}

#[test]
fn rows_must_be_given_in_order() {
    let mut bytes = Vec::new();
    let mut writer = SnapshotWriter::new(&mut bytes).unwrap();
    writer.row(2, b"b", b"").unwrap();
    for (table, key) in [(2, b"b"), (2, b"a"), (1, b"z")] {
        assert!(matches!(writer.row(table, key, b""), Err(SnapshotError::RowsOutOfOrder)));
    }
}

proptest! {
    #[test]
    fn i14_no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), whole in any::<bool>()) {
        let mut all = if whole { [MAGIC.as_slice(), &VERSION.to_be_bytes()].concat() } else { Vec::new() };
        all.extend(bytes);
        prop_assert!(read(&all).is_err());
    }
}

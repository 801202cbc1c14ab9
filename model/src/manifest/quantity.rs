//! Sizes and times as a manifest writes them: `64Mi`, `4Gi`, `2s`, `500ms`.

/// A size in MiB from `512Mi`, `4Gi` or `1Ti`.
pub(super) fn mebibytes(text: &str) -> Result<u64, &'static str> {
    const HOW: &str = "write a whole number with Mi, Gi or Ti, as in 256Mi";
    let (digits, factor) = match text.as_bytes() {
        [.., b'M', b'i'] => (&text[..text.len() - 2], 1),
        [.., b'G', b'i'] => (&text[..text.len() - 2], 1 << 10),
        [.., b'T', b'i'] => (&text[..text.len() - 2], 1 << 20),
        _ => return Err(HOW),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(HOW);
    }
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or(HOW)
}

/// Milliseconds from `500ms`, `10s`, `2 min`.
pub(super) fn milliseconds(text: &str) -> Result<u64, &'static str> {
    const HOW: &str = "write a time with its unit, as in 500ms, 10s or 2min";
    let duration = humantime::parse_duration(text).map_err(|_| HOW)?;
    u64::try_from(duration.as_millis()).map_err(|_| HOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(mebibytes("64Mi"), Ok(64));
        assert_eq!(mebibytes("4Gi"), Ok(4096));
        for bad in ["", "Mi", "64", "-1Mi", "1.5Gi", "64 Mi", "99999999999999999999Ti"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
        assert_eq!(milliseconds("2s"), Ok(2000));
        assert_eq!(milliseconds("500ms"), Ok(500));
        assert!(milliseconds("2").is_err());
    }
}

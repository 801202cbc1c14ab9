//! From a layer's compressed bytes to its tar stream: plain, gzip or zstd, by media type.
//!
//! Decoders hold at most one window (zstd: 128 MiB, the limit of the decoder crate); how much comes out is
//! bounded by whoever reads.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// The compression that a layer's media type stands for, or none if it is not a layer that can be used.
    pub(crate) fn of_media_type(media_type: &str) -> Option<Compression> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Some(Compression::None)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Some(Compression::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// A reader of the uncompressed bytes.
    pub(crate) fn reader<'a, R: Read + Send + 'a>(self, compressed: R) -> Box<dyn Read + Send + 'a> {
        match self {
            Compression::None => Box::new(compressed),
            Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::with_capacity(1 << 17, compressed))),
            Compression::Zstd => Box::new(ZstdFrames::new(BufReader::with_capacity(1 << 17, compressed))),
        }
    }
}

/// What every skippable frame's magic number is once its last four bits are cleared.
const SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

/// All frames of a zstd file one after the other; the decoder crate reads one.
struct ZstdFrames<R> {
    source: BufReader<R>,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: Read> ZstdFrames<R> {
    fn new(source: BufReader<R>) -> ZstdFrames<R> {
        ZstdFrames { source, decoder: FrameDecoder::new(), inside: false }
    }

    /// Enters the next frame that has content; false at the end of the file.
    fn enter_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            let mut magic = [0; 4];
            self.source.read_exact(&mut magic)?;
            if u32::from_le_bytes(magic) & !0xF != SKIPPABLE_MAGIC {
                self.decoder.init(magic.chain(&mut self.source)).map_err(invalid)?;
                return Ok(true);
            }
            let mut length = [0; 4];
            self.source.read_exact(&mut length)?;
            let length = u64::from(u32::from_le_bytes(length));
            if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(false)
    }

    /// At a frame's end: its checksum, where it has one, is that of what was decoded.
    fn leave_frame(&mut self) -> io::Result<()> {
        self.inside = false;
        match self.decoder.get_checksum_from_data() {
            Some(expected) if self.decoder.get_calculated_checksum() != Some(expected) => {
                Err(invalid("a zstd frame's checksum is wrong"))
            }
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.inside {
                if !self.enter_frame()? {
                    return Ok(0);
                }
                self.inside = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(invalid)?;
            }
            let bytes = self.decoder.read(buffer)?;
            if bytes > 0 {
                return Ok(bytes);
            }
            self.leave_frame()?;
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn read_all(compression: Compression, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        compression.reader(bytes).read_to_end(&mut out)?;
        Ok(out)
    }

    fn sample() -> Vec<u8> {
        (0..400_000u32).flat_map(|i| (i / 7 % 251).to_le_bytes()).collect()
    }

    #[test]
    fn every_compression_yields_the_same_bytes() {
        let bytes = sample();
        assert!(read_all(Compression::None, &bytes).unwrap() == bytes);
        assert!(read_all(Compression::Gzip, &gzip(&bytes)).unwrap() == bytes);
        assert!(read_all(Compression::Zstd, &zstd(&bytes)).unwrap() == bytes);
    }

    #[test]
    fn members_and_frames_are_read_one_after_the_other() {
        assert_eq!(read_all(Compression::Gzip, &[gzip(b"one "), gzip(b"two")].concat()).unwrap(), b"one two");
        let skippable = [&[0x5A, 0x2A, 0x4D, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let frames = [zstd(b"one "), skippable.clone(), zstd(b""), zstd(b"two"), skippable].concat();
        assert_eq!(read_all(Compression::Zstd, &frames).unwrap(), b"one two");
    }

    #[test]
    fn truncated_streams_are_errors() {
        let bytes = sample();
        for (compression, whole) in [(Compression::Gzip, gzip(&bytes)), (Compression::Zstd, zstd(&bytes))] {
            for cut in [1, 3, 5, 17, whole.len() / 2, whole.len() - 1] {
                assert!(read_all(compression, &whole[..cut]).is_err(), "{compression:?} cut at {cut}");
            }
        }
    }
}

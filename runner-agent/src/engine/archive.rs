//! Takes the one program out of a release's archive. Nothing else of it is written, and no name
//! in it becomes a path.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use zip::ZipArchive;
use zip::result::ZipError;

use super::release::Name;
use crate::digest::Digester;

/// Larger than any engine.
const LARGEST: u64 = 1 << 30;

const MOST_ENTRIES: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read it as a zip archive")]
    Damaged(#[source] ZipError),
    #[error("find {0} in it")]
    Absent(Name),
    #[error("unpack {0}: it is larger than {LARGEST} bytes")]
    TooLarge(Name),
    #[error("unpack {0}")]
    Unpack(Name, #[source] io::Error),
    #[error("write {0}")]
    Write(Name, #[source] io::Error),
}

/// Unpacks the program, and answers its SHA-256.
pub(crate) fn unpack(archive: File, name: Name, to: &mut File) -> Result<String, Error> {
    let mut archive = ZipArchive::new(BufReader::new(archive)).map_err(Error::Damaged)?;
    if archive.len() > MOST_ENTRIES {
        return Err(Error::Absent(name));
    }
    let entry = match archive.by_name(name.program()) {
        Ok(entry) if entry.is_file() => entry,
        Ok(_) | Err(ZipError::FileNotFound) => return Err(Error::Absent(name)),
        Err(error) => return Err(Error::Damaged(error)),
    };
    // What the entry says of its size is not believed.
    let mut entry = entry.take(LARGEST + 1);
    let mut digester = Digester::new();
    let mut buffer = vec![0u8; 256 * 1024];
    let mut length = 0;
    loop {
        let read = entry.read(&mut buffer).map_err(|source| Error::Unpack(name, source))?;
        if read == 0 {
            return Ok(digester.finish());
        }
        length += read as u64;
        if length > LARGEST {
            return Err(Error::TooLarge(name));
        }
        digester.update(&buffer[..read]);
        to.write_all(&buffer[..read]).map_err(|source| Error::Write(name, source))?;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Cursor;

    use zip::write::SimpleFileOptions;
    use zip::{CompressionMethod, ZipWriter};

    use super::*;
    use crate::digest;

    /// Packs files as a release.
    pub(crate) fn packed(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in files {
            // A real engine takes too long to compress for a test.
            let method = match bytes.len() {
                0..5_000_000 => CompressionMethod::Deflated,
                _ => CompressionMethod::Stored,
            };
            let options = SimpleFileOptions::default().compression_method(method);
            writer.start_file(*name, options.unix_permissions(0o755)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn unpacked(archive: &[u8]) -> Result<Vec<u8>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let (path, out) = (dir.path().join("zip"), dir.path().join("out"));
        std::fs::write(&path, archive).unwrap();
        let mut to = File::create(&out).unwrap();
        let found = unpack(File::open(&path).unwrap(), Name::Tofu, &mut to)?;
        let bytes = std::fs::read(out).unwrap();
        assert_eq!(found, digest::of_bytes(&bytes));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        Ok(bytes)
    }

    #[test]
    fn only_the_program_is_taken() {
        let files: &[(&str, &[u8])] =
            &[("LICENSE", b"l"), ("../tofu", b"climbs"), ("tofu", b"program"), ("x/tofu", b"deep")];
        assert_eq!(unpacked(&packed(files)).unwrap(), b"program");
        let without = unpacked(&packed(&[("../tofu", b"climbs"), ("bin/tofu", b"deep")]));
        assert!(matches!(without, Err(Error::Absent(Name::Tofu))), "{without:?}");
        assert!(matches!(unpacked(b"no archive"), Err(Error::Damaged(_))));
    }

    #[test]
    fn a_damaged_archive_is_noticed() {
        let noise: Vec<u8> =
            (0..100_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        let mut archive = packed(&[("tofu", &noise)]);
        archive[5000] ^= 1;
        assert!(unpacked(&archive).is_err());
    }
}

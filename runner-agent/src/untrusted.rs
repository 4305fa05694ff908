//! Reads files that terraform, or a program it runs, may have replaced by something else.
//!
//! A link is not followed, a pipe does not make us wait, and nothing is read without end.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use crate::digest;

/// The largest state that is taken anywhere.
const LARGEST: u64 = 256 << 20;

/// Answers `None` for an absent file. Blocks like any read of a disk.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 256 MiB"));
    }
    Ok(Some(bytes))
}

/// Answers the empty string for an absent file, as `ApprovedPlan.lock_file_digest` wants it.
pub(crate) fn digest(path: &Path) -> io::Result<String> {
    Ok(read(path)?.map(|bytes| digest::of_bytes(&bytes)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "x").unwrap();
        symlink("file", at("link")).unwrap();
        mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(read(&at("file")).unwrap(), Some(b"x".to_vec()));
        assert_eq!(read(&at("absent")).unwrap(), None);
        assert_eq!(digest(&at("absent")).unwrap(), "");
        for other in ["link", "pipe", "."] {
            assert!(read(&at(other)).is_err(), "{other}");
        }
        let large = std::fs::File::create(at("large")).unwrap();
        large.set_len(LARGEST + 1).unwrap();
        assert!(read(&at("large")).is_err());
    }
}

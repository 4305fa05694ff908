//! Reads files that terraform, or a program it runs, may have replaced by something else.
//!
//! A link is not followed, a pipe does not make us wait, and nothing is read without end. What
//! lies below a job's `work` is reached through a `Folder`: the way there is the job's to change,
//! and must not lead to another job.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2, renameat};
use rustix::io::Errno;

use crate::digest;

/// The largest state that is taken anywhere.
pub(crate) const LARGEST: u64 = 256 << 20;

/// A directory of the job's, held open: whatever stands at its path later, this is it.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl Folder {
    /// Opens a directory below `base`; links that lead out of `base` are not followed.
    pub(crate) fn open(base: &Path, below: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base = openat(CWD, base, flags | OFlags::NOFOLLOW, Mode::empty())?;
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        loop {
            match openat2(&base, below, flags, Mode::empty(), resolve) {
                // Something was renamed on the way.
                Err(Errno::AGAIN | Errno::INTR) => {}
                opened => return Ok(Self(opened?)),
            }
        }
    }

    /// Answers `None` for an absent file.
    pub(crate) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        read_at(&self.0, Path::new(name))
    }

    /// Moves what has this name, be it what it may. Answers whether there was something.
    pub(crate) fn take(&self, name: &str, to: &Path) -> io::Result<bool> {
        match renameat(&self.0, name, CWD, to) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Answers `None` for an absent file. Blocks like any read of a disk.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    read_at(CWD, path)
}

/// Opens a regular file that is not too large to be taken.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    open_at(CWD, path)
}

fn read_at(directory: impl AsFd, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match open_at(directory, path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    // It may have grown.
    if bytes.len() as u64 > LARGEST { Err(too_large()) } else { Ok(Some(bytes)) }
}

fn open_at(directory: impl AsFd, path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(directory, path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file"));
    }
    if metadata.len() > LARGEST { Err(too_large()) } else { Ok(file) }
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 256 MiB")
}

/// Answers the empty string for an absent file, as `ApprovedPlan.lock_file_digest` wants it.
pub(crate) fn digest(path: &Path) -> io::Result<String> {
    Ok(read(path)?.map(|bytes| digest::of_bytes(&bytes)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{FileType, mknodat};

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

    #[test]
    fn a_folder_is_not_left_by_links_and_stays_the_one_that_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["work/env", "other"] {
            std::fs::create_dir_all(at(folder)).unwrap();
            std::fs::write(at(folder).join("file"), folder).unwrap();
        }
        let work = at("work");
        let open = |below: &str| Folder::open(&work, Path::new(below));
        assert!(open("").unwrap().read("file").unwrap().is_none());
        let env = open("env").unwrap();

        std::fs::rename(at("work/env"), at("work/moved")).unwrap();
        symlink("../other", at("work/env")).unwrap();
        symlink("moved", at("work/inside")).unwrap();
        assert!(open("env").is_err());
        assert!(Folder::open(&at("work/inside"), Path::new("")).is_err());
        let inside = open("inside").unwrap().read("file").unwrap();
        assert_eq!(inside, Some(b"work/env".to_vec()));

        assert!(env.take("file", &at("taken")).unwrap());
        assert!(!env.take("file", &at("taken")).unwrap());
        assert_eq!(std::fs::read_to_string(at("taken")).unwrap(), "work/env");
        assert!(at("other/file").exists());
    }
}

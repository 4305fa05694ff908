//! Looks through a configuration archive while it is uploaded, and refuses what no build host
//! should ever unpack. The runner's extractor refuses the same again.

use std::io::{self, Read};
use std::path::{Component, Path};

use flate2::read::GzDecoder;
use latchkey_proto::v1::Reason;
use tar::{Archive, EntryType};

use crate::error::{Error, Result};

pub(super) const LARGEST_PACKED: u64 = 64 << 20;
const LARGEST_UNPACKED: u64 = 512 << 20;
const MOST_ENTRIES: usize = 20_000;
const LONGEST_PATH: usize = 1024;

/// Reads a gzipped tar to its end and refuses it by its first bad entry. Blocks.
pub(super) fn inspect(packed: impl Read) -> Result<()> {
    let mut archive =
        Archive::new(Bounded { inner: GzDecoder::new(packed), left: LARGEST_UNPACKED });
    let entries = archive.entries().map_err(unreadable)?;
    let mut count = 0;
    for entry in entries {
        let mut entry = entry.map_err(unreadable)?;
        count += 1;
        if count > MOST_ENTRIES {
            return Err(refused("", "has more than 20,000 entries; leave out what no plan needs"));
        }
        let path = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&path).escape_debug().to_string();
        let Ok(text) = std::str::from_utf8(&path) else {
            return Err(refused(&shown, "has a name that is not UTF-8; rename it"));
        };
        check_path(text, &shown)?;
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::Directory => {}
            EntryType::XGlobalHeader => continue,
            EntryType::Symlink | EntryType::Link => {
                return Err(refused(&shown, "is a link; pack its target instead"));
            }
            _ => return Err(refused(&shown, "is neither a file nor a directory; leave it out")),
        }
        io::copy(&mut entry, &mut io::sink()).map_err(unreadable)?;
    }
    if count == 0 {
        return Err(refused("", "is empty; pack a directory with Terraform files"));
    }
    Ok(())
}

fn check_path(path: &str, shown: &str) -> Result<()> {
    if path.len() > LONGEST_PATH {
        return Err(refused(shown, "has a path above 1,024 bytes; shorten it"));
    }
    if path.contains(['\0', '\\']) {
        return Err(refused(shown, "has a NUL or a backslash in its path; rename it"));
    }
    for component in Path::new(path).components() {
        match component {
            Component::Normal(_) | Component::CurDir => {}
            Component::ParentDir => {
                return Err(refused(shown, "has `..` in its path; pack it from within the root"));
            }
            Component::RootDir | Component::Prefix(_) => {
                return Err(refused(shown, "has an absolute path; pack it relative to the root"));
            }
        }
    }
    Ok(())
}

fn refused(entry: &str, what: &str) -> Error {
    let message = if entry.is_empty() {
        format!("the archive {what}")
    } else {
        format!("the archive's entry {entry} {what}")
    };
    Error::refused(Reason::ArchiveRefused, message).with("entry", entry)
}

fn unreadable(error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<TooLarge>()) {
        return refused("", "unpacks to more than 512 MiB; leave out what no plan needs");
    }
    refused("", "is no gzipped tar, or is cut off; pack it again")
}

/// Marks the error that [`Bounded`] ends with.
#[derive(Debug, thiserror::Error)]
#[error("unpack more than the limit")]
struct TooLarge;

/// Ends with an error instead of reading more than `left` bytes.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| io::Error::other(TooLarge))?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    use super::*;

    fn packed(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(vec![], Compression::fast()));
        for (path, kind, data) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            // Written as it is: the builder itself refuses bad paths.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    #[track_caller]
    fn refuses(entries: &[(&str, EntryType, &[u8])], part: &str) {
        let error = inspect(packed(entries).as_slice()).unwrap_err();
        assert_eq!(error.reason(), Reason::ArchiveRefused);
        assert!(error.message().contains(part), "{}", error.message());
    }

    #[test]
    fn an_ordinary_archive_passes() {
        let files: &[(&str, EntryType, &[u8])] = &[
            ("modules/", EntryType::Directory, b""),
            ("modules/a.tf", EntryType::Regular, b"# a"),
            ("./main.tf", EntryType::Regular, b"# main"),
        ];
        inspect(packed(files).as_slice()).unwrap();
    }

    #[test]
    fn slips_links_and_devices_are_refused_by_name() {
        refuses(&[("../evil.tf", EntryType::Regular, b"")], "`..`");
        refuses(&[("a/../../evil.tf", EntryType::Regular, b"")], "`..`");
        refuses(&[("/etc/evil", EntryType::Regular, b"")], "absolute");
        refuses(&[("link", EntryType::Symlink, b"")], "is a link");
        refuses(&[("hard", EntryType::Link, b"")], "is a link");
        refuses(&[("null", EntryType::Char, b"")], "neither a file");
        refuses(&[("pipe", EntryType::Fifo, b"")], "neither a file");
        refuses(&[], "empty");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let mut gz = GzEncoder::new(vec![], Compression::best());
        let mut header = Header::new_gnu();
        header.set_path("zeros").unwrap();
        header.set_size(600 << 20);
        header.set_mode(0o644);
        header.set_cksum();
        gz.write_all(header.as_bytes()).unwrap();
        let chunk = vec![0_u8; 1 << 20];
        for _ in 0..600 {
            gz.write_all(&chunk).unwrap();
        }
        let error = inspect(gz.finish().unwrap().as_slice()).unwrap_err();
        assert!(error.message().contains("512 MiB"), "{}", error.message());
    }

    #[test]
    fn what_is_no_archive_is_told_so() {
        assert!(inspect(b"not gzip".as_slice()).unwrap_err().message().contains("no gzipped tar"));
    }
}

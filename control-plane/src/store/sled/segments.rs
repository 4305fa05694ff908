//! One file of audit records that never change again.
//!
//! ```text
//! magic            8   with the format of the file
//! organization    16
//! first            8   the number of the first record
//! count            4
//! per record      12   where it ends, counted from the first (4), its check (8)
//! digest          32   SHA-256 of all above
//! records              each as the database had it: version (8), value
//! ```
//!
//! Numbers are big-endian. A record's check is the beginning of its SHA-256, so one record is
//! read without the others and damage to it is known; that nobody changed it on purpose is what
//! its chain tells ([`crate::audit`]). The digest covers the checks, and so the whole file; the
//! database keeps it too, so a file of other records is not taken for this one.
//!
//! A file is written beside its name, synced, renamed, and all directories synced that lead to it,
//! whoever made them: one that a killed process made may not be durable. What a kill leaves under
//! the other name, or under the name before the database knows of it, is written over by the next
//! attempt, whatever it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};

use crate::durable;

const MAGIC: &[u8; 8] = b"LKAUDIT\x01";
const START: usize = 8 + 16 + 8 + 4;
const ROW: usize = 4 + CHECK;
const CHECK: usize = 8;
const DIGEST: usize = 32;
const BUFFER: usize = 256 * 1024;

/// The id of an organization, as keys have it.
pub(super) type Organization = [u8; 16];

/// Which records a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) organization: Organization,
    pub(super) first: u64,
    pub(super) count: u32,
}

/// What the database knows of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) count: u32,
    pub(super) length: u64,
    pub(super) digest: [u8; DIGEST],
}

impl Entry {
    pub(super) fn encode(&self) -> Vec<u8> {
        [&self.count.to_be_bytes()[..], &self.length.to_be_bytes(), &self.digest].concat()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (count, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        Some(Self {
            count: u32::from_be_bytes(*count),
            length: u64::from_be_bytes(*length),
            digest: rest.try_into().ok()?,
        })
    }
}

/// Why a file was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// Nothing is lost: the records are still in the database.
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// What the disk holds is unknown; a second attempt may succeed without having written.
    #[error("sync {path}")]
    Sync {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Makes a file or directory durable, given with its path; replaced in tests to fail.
pub(super) type SyncFile = Arc<dyn Fn(&Path, &File) -> io::Result<()> + Send + Sync>;

/// Has the system do it.
pub(super) fn sync_file() -> SyncFile {
    Arc::new(|_, file| file.sync_all())
}

/// Where the organization's files are.
pub(super) fn directory(archive: &Path, organization: Organization) -> PathBuf {
    archive.join(hex::encode(organization))
}

/// The file that begins with this record. Names sort as their numbers do.
pub(super) fn path(archive: &Path, organization: Organization, first: u64) -> PathBuf {
    directory(archive, organization).join(format!("{first:020}"))
}

/// A file that is being written.
pub(super) struct NewSegment {
    range: Range,
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    /// The beginning of the file, as far as it is known.
    head: Vec<u8>,
    end: u32,
    sync: SyncFile,
}

impl NewSegment {
    pub(super) fn create(archive: &Path, range: Range, sync: SyncFile) -> Result<Self, WriteError> {
        let path = path(archive, range.organization, range.first);
        let temporary = path.with_extension("new");
        let failed = |source| WriteError::Write { path: path.clone(), source };
        // Synced with the file: a failure of that must not be taken for one of this.
        durable::make_private_directory(archive).map_err(failed)?;
        durable::make_private_directory(&directory(archive, range.organization)).map_err(failed)?;
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed)?;
        file.seek(SeekFrom::Start(head_length(range.count))).map_err(failed)?;
        let mut head = MAGIC.to_vec();
        head.extend(range.organization);
        head.extend(range.first.to_be_bytes());
        head.extend(range.count.to_be_bytes());
        let file = BufWriter::with_capacity(BUFFER, file);
        Ok(Self { range, path, temporary, file, head, end: 0, sync })
    }

    /// Adds the next record, as the database has it.
    pub(super) fn push(&mut self, stored: &[u8]) -> Result<(), WriteError> {
        let end = u32::try_from(stored.len()).ok().and_then(|length| self.end.checked_add(length));
        self.end = end.ok_or_else(|| self.failed(invalid("the records are too large")))?;
        self.head.extend(self.end.to_be_bytes());
        self.head.extend(check(stored));
        self.file.write_all(stored).map_err(|source| self.failed(source))
    }

    /// Makes the file durable and gives it its name.
    pub(super) fn finish(mut self) -> Result<Entry, WriteError> {
        let whole = START + ROW * self.range.count as usize;
        if self.head.len() != whole {
            return Err(self.failed(invalid("the number of records is another")));
        }
        let digest = sha256(&self.head);
        self.head.extend(digest);
        latchkey_failpoint::check("cp.store.segment.disk")
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().write_all_at(&self.head, 0))
            .map_err(|source| self.failed(source))?;
        self.sync(&self.temporary, self.file.get_ref())?;
        fs::rename(&self.temporary, &self.path).map_err(|source| self.failed(source))?;
        // The organization's, the archive's and the store's.
        for directory in self.path.ancestors().skip(1).take(3) {
            let directory =
                if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
            let opened = File::open(directory)
                .map_err(|source| WriteError::Sync { path: directory.to_path_buf(), source })?;
            self.sync(directory, &opened)?;
        }
        let length = self.head.len() as u64 + u64::from(self.end);
        Ok(Entry { count: self.range.count, length, digest })
    }

    fn sync(&self, path: &Path, file: &File) -> Result<(), WriteError> {
        (self.sync)(path, file)
            .map_err(|source| WriteError::Sync { path: path.to_path_buf(), source })
    }

    fn failed(&self, source: io::Error) -> WriteError {
        WriteError::Write { path: self.path.clone(), source }
    }
}

/// Tells whether the file is there with its whole length: what can be asked of thousands of files
/// at a start. The rest is judged as it is read.
pub(super) fn stat(path: &Path, entry: &Entry) -> io::Result<()> {
    let found = fs::metadata(path)?.len();
    if found == entry.length { Ok(()) } else { Err(invalid("the file has another length")) }
}

/// A file open for reading.
pub(super) struct Segment {
    file: File,
    /// Where each record ends, and its check.
    rows: Vec<(u32, [u8; CHECK])>,
    start: u64,
}

/// The record, counted from the file's first, that can't be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) index: u32,
    pub(super) source: io::Error,
}

impl Segment {
    pub(super) fn open(path: &Path, range: Range, entry: &Entry) -> io::Result<Self> {
        let file = File::open(path)?;
        let start = head_length(range.count);
        let length = usize::try_from(start).map_err(|_| invalid("the file is too large"))?;
        let mut head = vec![0; length];
        file.read_exact_at(&mut head, 0)?;
        let (body, digest) = head.split_at(length - DIGEST);
        if sha256(body) != entry.digest || digest != entry.digest {
            return Err(invalid("its beginning is not what was written"));
        }
        let (about, rows) = body.split_at(START);
        let expected = [
            MAGIC,
            &range.organization[..],
            &range.first.to_be_bytes(),
            &range.count.to_be_bytes(),
        ];
        if about != expected.concat() {
            return Err(invalid("it holds other records than its name says"));
        }
        let (rows, _) = rows.as_chunks::<ROW>();
        let row = |row: &[u8; ROW]| {
            let (end, check) = row.split_first_chunk().expect("a row has a number");
            (u32::from_be_bytes(*end), check.try_into().expect("and the rest is a check"))
        };
        Ok(Self { file, rows: rows.iter().map(row).collect(), start })
    }

    /// Reads records, counted from the file's first, at one stroke.
    pub(super) fn read(&self, from: u32, to: u32) -> Result<Vec<Vec<u8>>, Unreadable> {
        let failed = |index, source| Unreadable { index, source };
        let begin = self.begin(from);
        let rows = self.rows.get(from as usize..=to as usize).unwrap_or_default();
        let end = rows.last().map_or(begin, |(end, _)| *end);
        let length = end.checked_sub(begin).ok_or_else(|| failed(from, invalid("lengths")))?;
        let mut bytes = vec![0; length as usize];
        let at = self.start + u64::from(begin);
        self.file.read_exact_at(&mut bytes, at).map_err(|error| failed(from, error))?;
        let mut rest = bytes.as_slice();
        let mut begin = begin;
        let mut records = Vec::with_capacity(rows.len());
        for (index, (end, expected)) in (from..).zip(rows) {
            let record = end
                .checked_sub(begin)
                .and_then(|length| rest.split_off(..length as usize))
                .filter(|record| check(record) == *expected)
                .ok_or_else(|| failed(index, invalid("the record is not what was written")))?;
            records.push(record.to_vec());
            begin = *end;
        }
        Ok(records)
    }

    fn begin(&self, index: u32) -> u32 {
        let before = index.checked_sub(1).and_then(|before| self.rows.get(before as usize));
        before.map_or(0, |(end, _)| *end)
    }
}

fn head_length(count: u32) -> u64 {
    (START + DIGEST) as u64 + ROW as u64 * u64::from(count)
}

fn check(stored: &[u8]) -> [u8; CHECK] {
    *sha256(stored).first_chunk().expect("a digest is longer")
}

fn sha256(bytes: &[u8]) -> [u8; DIGEST] {
    digest(&SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

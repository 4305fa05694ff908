//! The files of a backup: linked or copied, and listed with their digests.
//!
//! A link shares its bytes with the original. That is safe where the original is only ever
//! replaced or removed, never written to: so it is for blobs and for finished logs.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use super::Sum;
use crate::durable;

pub(super) const NAME: &str = "files";

const CHUNK: usize = 256 * 1024;

/// One file, as the listing has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Within the backup, and within a data directory.
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl Entry {
    /// Tells whether the path leads nowhere else than to where the files of a backup are.
    pub(super) fn is_within(&self, places: &[&str]) -> bool {
        let mut parts = self.path.components();
        let first = matches!(parts.next(), Some(Component::Normal(first))
            if places.iter().any(|place| first == *place));
        let mut parts = parts.peekable();
        first && parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
    }
}

/// Puts files into a backup and lists them.
#[derive(Debug)]
pub(super) struct Listing {
    directory: PathBuf,
    list: Digesting<BufWriter<File>>,
    count: u64,
    bytes: u64,
    /// The directory of the last file, whose names are not durable yet.
    unsynced: Option<PathBuf>,
}

impl Listing {
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        let list = create(&directory.join(NAME))?;
        Ok(Self {
            directory: directory.to_path_buf(),
            list: Digesting::new(BufWriter::with_capacity(CHUNK, list)),
            count: 0,
            bytes: 0,
            unsynced: None,
        })
    }

    /// Puts a file that is never written to again.
    pub(super) fn link(&mut self, from: &Path, path: &Path) -> io::Result<()> {
        let to = self.place(path)?;
        match fs::hard_link(from, &to) {
            Ok(()) => {
                let (bytes, sha256) = sum(&to)?;
                self.list(path, bytes, sha256)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
            // Another file system, or one without links, or too many links.
            Err(_) => self.copy(from, path, None),
        }
    }

    /// Puts a copy of a file, or of its beginning.
    pub(super) fn copy(&mut self, from: &Path, path: &Path, length: Option<u64>) -> io::Result<()> {
        let to = self.place(path)?;
        let (bytes, sha256) = copy(from, &to, length)?;
        self.list(path, bytes, sha256)
    }

    fn place(&mut self, path: &Path) -> io::Result<PathBuf> {
        let to = self.directory.join(path);
        let parent = to.parent().map(Path::to_path_buf);
        if parent != self.unsynced {
            self.sync_last()?;
            if let Some(parent) = &parent {
                create_directories(&self.directory, parent)?;
            }
            self.unsynced = parent;
        }
        Ok(to)
    }

    fn list(&mut self, path: &Path, bytes: u64, sha256: String) -> io::Result<()> {
        self.count += 1;
        self.bytes += bytes;
        serde_json::to_writer(&mut self.list, &Entry { path: path.to_path_buf(), bytes, sha256 })?;
        self.list.write_all(b"\n")
    }

    fn sync_last(&mut self) -> io::Result<()> {
        match self.unsynced.take() {
            Some(directory) => durable::sync_directory(&directory),
            None => Ok(()),
        }
    }

    pub(super) fn finish(mut self) -> io::Result<Sum> {
        self.sync_last()?;
        let (_, sha256, list) = self.list.finish();
        list.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        durable::sync_directory(&self.directory)?;
        Ok(Sum { count: self.count, bytes: self.bytes, sha256 })
    }
}

/// Reads a listing, which was found whole.
pub(super) fn entries(directory: &Path) -> io::Result<impl Iterator<Item = io::Result<Entry>>> {
    let lines = BufReader::new(File::open(directory.join(NAME))?).lines();
    Ok(lines.map(|line| line.and_then(|line| Ok(serde_json::from_str(&line)?))))
}

/// Copies a file, or its beginning, and makes the bytes durable. Returns their number and digest.
pub(super) fn copy(from: &Path, to: &Path, length: Option<u64>) -> io::Result<(u64, String)> {
    let mut from = File::open(from)?.take(length.unwrap_or(u64::MAX));
    let mut to = Digesting::new(create(to)?);
    // Not by the kernel alone: the digest is of what was read.
    pump(&mut from, &mut to)?;
    let (bytes, sha256, file) = to.finish();
    if length.is_some_and(|length| length != bytes) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter"));
    }
    file.sync_all()?;
    Ok((bytes, sha256))
}

/// Returns the size and digest of a file.
pub(super) fn sum(path: &Path) -> io::Result<(u64, String)> {
    let mut nowhere = Digesting::new(io::sink());
    pump(&mut File::open(path)?, &mut nowhere)?;
    let (bytes, sha256, _) = nowhere.finish();
    Ok((bytes, sha256))
}

fn pump(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&chunk[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Creates the directories from `top` down to `path`, each private and its name durable.
pub(super) fn create_directories(top: &Path, path: &Path) -> io::Result<()> {
    let Ok(below) = path.strip_prefix(top) else { return Ok(()) };
    let mut at = top.to_path_buf();
    for part in below.components() {
        at.push(part);
        if !at.is_dir() {
            durable::create_private_directory(&at)?;
        }
    }
    Ok(())
}

/// Returns a hidden name beside `path`, for work on what will be `path`.
pub(super) fn beside(path: &Path, what: &str) -> Option<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name()?);
    name.push(".latchkey-");
    name.push(what);
    Some(path.with_file_name(name))
}

/// Makes an empty directory to work in, and throws away what a killed process left in it. Answers
/// what keeps others out, or nothing when another is at work.
pub(super) fn claim(path: &Path) -> io::Result<Option<File>> {
    durable::create_private_directory(path)?;
    let directory = File::open(path)?;
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(Some(directory))
}

pub(super) fn is_empty_directory(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Digests what passes through.
pub(super) struct Digesting<W> {
    to: W,
    context: digest::Context,
    bytes: u64,
}

impl<W> std::fmt::Debug for Digesting<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digesting({} bytes)", self.bytes)
    }
}

impl<W: Write> Digesting<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, context: digest::Context::new(&digest::SHA256), bytes: 0 }
    }

    /// Returns how many bytes passed, their digest in hex, and where they went.
    pub(super) fn finish(self) -> (u64, String, W) {
        (self.bytes, hex::encode(self.context.finish()), self.to)
    }
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.context.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

//! Unpacks an archive that somebody else packed.
//!
//! Nothing outside the directory is ever written: names are checked component by component,
//! every file is opened beneath a directory handle without following links and only if it does
//! not exist yet, and links, devices and everything unusual are refused. The archive of a
//! sealed workspace may hold relative links that stay inside; its digest was checked before.
//!
//! A link's target may have `..` at its front only, where it is resolved from a real directory:
//! further inside, `..` could climb out through another link.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use flate2::read::GzDecoder;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, symlinkat};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

/// What an archive may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) links: Links,
    pub(crate) entries: usize,
    pub(crate) bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    Refuse,
    InsideOnly,
}

/// For what people upload.
pub(crate) const CONFIGURATION: Limits =
    Limits { links: Links::Refuse, entries: 20_000, bytes: 512 << 20 };

/// For what a runner sealed after a plan: the configuration, its modules and side files.
pub(crate) const WORKSPACE: Limits =
    Limits { links: Links::InsideOnly, entries: 200_000, bytes: 4 << 30 };

const LONGEST_PATH: usize = 1024;
const DEEPEST_PATH: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("unpack the archive: {entry:?} {problem}")]
    Refused { entry: String, problem: Problem },
    #[error("unpack the archive: it is damaged")]
    Damaged(#[source] io::Error),
    #[error("unpack the archive: write {entry:?}")]
    Write {
        entry: String,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    #[error("has an absolute path")]
    Absolute,
    #[error("contains `..`")]
    Parent,
    #[error("has a path that is too long or too deep")]
    TooLong,
    #[error("has a name that is empty or holds a zero byte")]
    Name,
    #[error("is a link")]
    Link,
    #[error("is a link that leads outside")]
    LinkOutside,
    #[error("is neither a file nor a directory")]
    Kind,
    #[error("appears twice")]
    Twice,
    #[error("lies below something that is no directory")]
    BelowFile,
    #[error("exceeds the number of entries allowed")]
    TooMany,
    #[error("exceeds the size allowed")]
    TooLarge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    Directory,
    File,
    Link,
}

/// Unpacks a gzipped tar into an existing directory.
pub(crate) fn extract(archive: impl Read, into: &Path, limits: Limits) -> Result<(), Error> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    let root = openat(CWD, into, flags, Mode::empty()).map_err(|errno| Error::Write {
        entry: into.display().to_string(),
        source: errno.into(),
    })?;
    // Also bounds what the tar reader buffers for long names.
    let whole = limits.bytes + 4096 * limits.entries as u64;
    let mut archive = Archive::new(GzDecoder::new(archive).take(whole));
    let mut extractor = Extractor { root, limits, made: HashMap::new(), entries: 0, bytes: 0 };
    for entry in archive.entries().map_err(Error::Damaged)? {
        extractor.entry(entry.map_err(Error::Damaged)?)?;
    }
    Ok(())
}

struct Extractor {
    root: OwnedFd,
    limits: Limits,
    /// What exists below the root, all of it made here.
    made: HashMap<PathBuf, Made>,
    entries: usize,
    bytes: u64,
}

impl Extractor {
    fn entry<R: Read>(&mut self, mut entry: Entry<'_, R>) -> Result<(), Error> {
        let raw = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&raw).into_owned();
        let refused = |problem| Error::Refused { entry: shown.clone(), problem };

        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(refused(Problem::TooMany));
        }
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let path = checked_path(&raw).map_err(refused)?;
        match kind {
            EntryType::Directory => {
                if !path.as_os_str().is_empty() {
                    self.directory(&path).map_err(|failure| failure.at(&shown))?;
                }
                Ok(())
            }
            EntryType::Regular | EntryType::Continuous => {
                if path.as_os_str().is_empty() {
                    return Err(refused(Problem::Name));
                }
                self.bytes = self.bytes.saturating_add(entry.size());
                if self.bytes > self.limits.bytes {
                    return Err(refused(Problem::TooLarge));
                }
                let executable = entry.header().mode().is_ok_and(|mode| mode & 0o100 != 0);
                self.file(&path, executable, &mut entry).map_err(|failure| failure.at(&shown))
            }
            EntryType::Symlink if self.limits.links == Links::InsideOnly => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                self.link(&path, &target).map_err(|failure| failure.at(&shown))
            }
            EntryType::Symlink | EntryType::Link => Err(refused(Problem::Link)),
            // The tar crate's enum is open: whatever else there is, is refused.
            _ => Err(refused(Problem::Kind)),
        }
    }

    fn directory(&mut self, path: &Path) -> Result<(), Failure> {
        let mut so_far = PathBuf::new();
        for part in path.components() {
            let parent = so_far.clone();
            so_far.push(part);
            match self.made.get(&so_far) {
                Some(Made::Directory) => continue,
                Some(Made::File | Made::Link) => return Err(Problem::BelowFile.into()),
                None => {}
            }
            let handle = self.open_directory(&parent)?;
            mkdirat(handle, part.as_os_str(), Mode::from_raw_mode(0o700))?;
            self.made.insert(so_far.clone(), Made::Directory);
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, executable: bool, from: &mut impl Read) -> Result<(), Failure> {
        let parent = self.claim(path, Made::File)?;
        let mode = Mode::from_raw_mode(if executable { 0o700 } else { 0o600 });
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let name = path.file_name().ok_or(Problem::Name)?;
        let file = openat(parent, name, flags | OFlags::CLOEXEC, mode)?;
        io::copy(from, &mut File::from(file)).map_err(Failure::Io)?;
        Ok(())
    }

    fn link(&mut self, path: &Path, target: &[u8]) -> Result<(), Failure> {
        let target = std::str::from_utf8(target).map_err(|_| Problem::LinkOutside)?;
        let depth = path.components().count().saturating_sub(1);
        if !link_stays_inside(depth, Path::new(target)) {
            return Err(Problem::LinkOutside.into());
        }
        let parent = self.claim(path, Made::Link)?;
        symlinkat(target, parent, path.file_name().ok_or(Problem::Name)?)?;
        Ok(())
    }

    /// Takes the name, makes its parents, and answers the parent's handle.
    fn claim(&mut self, path: &Path, made: Made) -> Result<OwnedFd, Failure> {
        if self.made.contains_key(path) {
            return Err(Problem::Twice.into());
        }
        let parent = path.parent().unwrap_or(Path::new(""));
        self.directory(parent)?;
        self.made.insert(path.to_owned(), made);
        self.open_directory(parent)
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Failure> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::RDONLY;
        if path.as_os_str().is_empty() {
            return Ok(openat(&self.root, ".", flags, Mode::empty())?);
        }
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match openat2(&self.root, path, flags, Mode::empty(), resolve) {
            Ok(handle) => Ok(handle),
            // Old kernels and some sandboxes lack it; component by component is as strict.
            Err(Errno::NOSYS | Errno::PERM) => {
                let mut handle = openat(self.root.as_fd(), ".", flags, Mode::empty())?;
                for part in path.components() {
                    handle = openat(&handle, part.as_os_str(), flags, Mode::empty())?;
                }
                Ok(handle)
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

enum Failure {
    Problem(Problem),
    Io(io::Error),
}

impl Failure {
    fn at(self, entry: &str) -> Error {
        match self {
            Self::Problem(problem) => Error::Refused { entry: entry.to_owned(), problem },
            Self::Io(source) => Error::Write { entry: entry.to_owned(), source },
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Tells whether a link at this depth (the number of its parents) leads to a place inside.
pub(crate) fn link_stays_inside(depth: usize, target: &Path) -> bool {
    let mut up = 0;
    let mut went_down = false;
    for component in target.components() {
        match component {
            Component::ParentDir if went_down => return false,
            Component::ParentDir => up += 1,
            Component::Normal(_) => went_down = true,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    up <= depth && (went_down || up > 0)
}

/// Answers a name as it may stand in an archive.
pub(crate) fn checked_path(raw: &[u8]) -> Result<PathBuf, Problem> {
    if raw.len() > LONGEST_PATH {
        return Err(Problem::TooLong);
    }
    if raw.contains(&0) {
        return Err(Problem::Name);
    }
    let text = std::str::from_utf8(raw).map_err(|_| Problem::Name)?;
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(part) if part.len() > 255 => return Err(Problem::TooLong),
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err(Problem::Parent),
            Component::RootDir | Component::Prefix(_) => return Err(Problem::Absolute),
        }
    }
    if path.components().count() > DEEPEST_PATH {
        return Err(Problem::TooLong);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use tar::{Builder, Header};

    use super::*;

    /// Builds an archive without the tar crate's own checks of names.
    fn pack(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            let linked = matches!(kind, EntryType::Symlink | EntryType::Link);
            if linked {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            let data = if linked { "" } else { content };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    #[track_caller]
    fn check(entries: &[(&str, EntryType, &str)], limits: Limits, expect: Result<(), Problem>) {
        let base = tempfile::tempdir().unwrap();
        let into = base.path().join("in/side");
        fs::create_dir_all(&into).unwrap();
        let found = match extract(pack(entries).as_slice(), &into, limits) {
            Ok(()) => Ok(()),
            Err(Error::Refused { problem, .. }) => Err(problem),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(found, expect, "{entries:?}");
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1, "something got outside");
        assert_eq!(fs::read_dir(base.path().join("in")).unwrap().count(), 1, "or beside");
    }

    #[test]
    fn known_slips_are_refused() {
        use EntryType as T;
        let (c, w) = (CONFIGURATION, WORKSPACE);
        check(&[("/etc/x", T::Regular, "")], c, Err(Problem::Absolute));
        check(&[("../x", T::Regular, "")], c, Err(Problem::Parent));
        check(&[("a/../../x", T::Regular, "")], c, Err(Problem::Parent));
        check(&[("a/..", T::Directory, "")], c, Err(Problem::Parent));
        check(&[("l", T::Symlink, "a")], c, Err(Problem::Link));
        check(&[("l", T::Link, "a")], c, Err(Problem::Link));
        check(&[("l", T::Link, "a")], w, Err(Problem::Link));
        check(&[("l", T::Symlink, "/etc")], w, Err(Problem::LinkOutside));
        check(&[("l", T::Symlink, "..")], w, Err(Problem::LinkOutside));
        check(&[("a/l", T::Symlink, "../../x")], w, Err(Problem::LinkOutside));
        check(&[("a/l", T::Symlink, "b/../x")], w, Err(Problem::LinkOutside));
        check(&[("l", T::Symlink, "a"), ("l/x", T::Regular, "")], w, Err(Problem::BelowFile));
        check(&[("l", T::Symlink, "a"), ("l", T::Regular, "")], w, Err(Problem::Twice));
        check(&[("f", T::Regular, ""), ("f", T::Regular, "")], c, Err(Problem::Twice));
        check(&[("f", T::Regular, ""), ("f", T::Directory, "")], c, Err(Problem::BelowFile));
        check(&[("d", T::Directory, ""), ("d", T::Regular, "")], c, Err(Problem::Twice));
        check(&[("f", T::Fifo, "")], c, Err(Problem::Kind));
        check(&[("f", T::Char, "")], c, Err(Problem::Kind));
        check(&[("f", T::Block, "")], c, Err(Problem::Kind));
        check(&[("./", T::Regular, "")], c, Err(Problem::Name));
        let deep = "d/".repeat(45);
        check(&[(&deep, T::Directory, "")], c, Ok(()));
    }

    #[test]
    fn caps_hold() {
        use EntryType as T;
        let small = Limits { links: Links::Refuse, entries: 2, bytes: 5 };
        check(&[("a", T::Regular, "123"), ("b", T::Regular, "45")], small, Ok(()));
        check(&[("a", T::Regular, "123456")], small, Err(Problem::TooLarge));
        let three = [("a", T::Regular, ""), ("b", T::Regular, ""), ("c", T::Regular, "")];
        check(&three, small, Err(Problem::TooMany));
    }

    #[test]
    fn plain_archives_and_inner_links_are_unpacked() {
        use EntryType as T;
        let dir = tempfile::tempdir().unwrap();
        let archive = pack(&[
            ("./", T::Directory, ""),
            ("./main.tf", T::Regular, "one"),
            ("mod/a/x.tf", T::Regular, "two"),
            ("mod/l", T::Symlink, "../main.tf"),
        ]);
        extract(archive.as_slice(), dir.path(), WORKSPACE).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("mod/a/x.tf")).unwrap(), "two");
        assert_eq!(fs::read_to_string(dir.path().join("mod/l")).unwrap(), "one");
    }

    #[test]
    fn a_damaged_archive_is_told_from_a_refused_one() {
        let dir = tempfile::tempdir().unwrap();
        let found = extract(b"no archive".as_slice(), dir.path(), CONFIGURATION);
        assert!(matches!(found, Err(Error::Damaged(_))), "{found:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn nothing_is_written_outside(
            entries in prop::collection::vec(
                ("[a./]{1,12}", prop::sample::select(vec![
                    EntryType::Regular, EntryType::Directory, EntryType::Symlink,
                ]), "[a./]{1,8}"),
                1..8,
            )
        ) {
            let base = tempfile::tempdir().unwrap();
            let into = base.path().join("in");
            fs::create_dir(&into).unwrap();
            let entries: Vec<_> =
                entries.iter().map(|(n, k, c)| (n.as_str(), *k, c.as_str())).collect();
            let _ = extract(pack(&entries).as_slice(), &into, WORKSPACE);
            prop_assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
            let root = into.canonicalize().unwrap();
            let mut todo = vec![root.clone()];
            while let Some(dir) = todo.pop() {
                for entry in fs::read_dir(dir).unwrap() {
                    let entry = entry.unwrap();
                    if entry.file_type().unwrap().is_dir() {
                        todo.push(entry.path());
                    } else if let Ok(real) = entry.path().canonicalize() {
                        prop_assert!(real.starts_with(&root), "{:?}", real);
                    }
                }
            }
        }
    }
}

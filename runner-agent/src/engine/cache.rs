//! Engines that were installed on this host, whole or not at all.
//!
//! ```text
//! <cache>/terraform/1.11.4/terraform   the program
//! <cache>/terraform/1.11.4/sha256      its digest, checked before the first use by each agent
//! <cache>/terraform/.new-1.11.4/       being made; worthless without its lock held
//! <cache>/terraform/.1.11.4.lock       held while somebody installs
//! ```
//!
//! 1. Whoever misses a version takes its lock; those behind find it whole and use it.
//! 2. The mirror's list of checksums is read, and compared with a pinned digest.
//! 3. The archive is downloaded into the draft, and compared.
//! 4. The program alone is unpacked, synced, and asked for its version.
//! 5. The draft gets its name. Nothing before this moment is ever taken for an engine.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};

use super::checksum::{self, Sha256};
use super::mirror::{self, Mirror};
use super::release::{Name, Release, Version};
use super::version::GiveUp;
use super::{archive, version};
use crate::digest;
use crate::supervisor::confine::Confinement;

const LARGEST_SUMS: u64 = 1 << 20;
const LARGEST_ARCHIVE: u64 = 512 << 20;

/// The record of the program's digest.
const DIGEST: &str = "sha256";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    #[error("find {archive} in the mirror's list of checksums")]
    Unlisted { archive: String },
    #[error("trust {archive}: its checksum differs: {expected} is {by}, {found} was found")]
    Checksum { archive: String, by: &'static str, expected: String, found: String },
    #[error("unpack {archive}")]
    Archive {
        archive: String,
        #[source]
        source: archive::Error,
    },
    #[error("use the program in {archive}: asked for its version, it does not say {expected}")]
    OtherVersion { archive: String, expected: String },
    #[error("use it: it is absent or damaged, and --no-engine-install forbids to install it")]
    Forbidden,
    #[error("{what} {path}")]
    Disk {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Tells a fault of this host or its way to the mirror, which another host may not have.
    pub(crate) fn is_of_this_host(&self) -> bool {
        match self {
            Self::Mirror(mirror::Error::Unreachable { .. } | mirror::Error::Keep { .. })
            | Self::Archive { source: archive::Error::Write(..), .. }
            | Self::Forbidden
            | Self::Disk { .. } => true,
            Self::Mirror(mirror::Error::Absent { .. } | mirror::Error::TooLarge { .. })
            | Self::Archive { .. }
            | Self::Unlisted { .. }
            | Self::Checksum { .. }
            | Self::OtherVersion { .. } => false,
        }
    }
}

/// What an installation needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) mirror: &'a Mirror,
    /// A digest that the archive must have whatever the mirror's list says.
    pub(crate) pin: Option<&'a Sha256>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installed {
    Now,
    Before,
}

#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    /// Of a program that is asked for its version.
    confinement: Confinement,
    /// What was found whole by this process, and how its file looked then: whatever writes to a
    /// file changes its `ctime`, which nobody can set back.
    whole: Mutex<HashMap<Release, Look>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Look {
    device: u64,
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl Look {
    fn at(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl Cache {
    pub(crate) fn new(root: PathBuf, confinement: Confinement) -> Self {
        Self { root, confinement, whole: Mutex::default() }
    }

    /// Answers where a release's program is, or would be.
    pub(crate) fn path(&self, release: &Release) -> PathBuf {
        self.directory(release).join(release.name.program())
    }

    /// Lists what seems to be installed, the newest first.
    pub(crate) fn list(&self, name: Name) -> Vec<Release> {
        let entries = fs::read_dir(self.root.join(name.program())).into_iter().flatten().flatten();
        let versions = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut versions: Vec<Version> = versions.collect();
        versions.sort_by(|a, b| b.order().cmp(&a.order()));
        let releases = versions.into_iter().map(|version| Release { name, version });
        releases.filter(|release| self.path(release).is_file()).collect()
    }

    /// Tells whether a release is there and undamaged.
    pub(crate) fn has(&self, release: &Release) -> bool {
        let path = self.path(release);
        let Ok(look) = Look::at(&path) else { return false };
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if whole.get(release) == Some(&look) {
            return true;
        }
        let recorded = fs::read_to_string(self.directory(release).join(DIGEST)).ok();
        let recorded = recorded.and_then(|text| Sha256::parse(text.trim()));
        let found = digest::of_file(&path).ok();
        let is_whole = recorded.is_some_and(|sha256| found.as_deref() == Some(sha256.as_str()))
            && fs::metadata(&path).is_ok_and(|metadata| metadata.permissions().mode() & 0o100 != 0);
        if is_whole {
            whole.insert(release.clone(), look);
        }
        is_whole
    }

    /// Installs a release unless it is there. Blocks, perhaps for minutes: also while another
    /// process or job installs the same.
    pub(crate) fn install(&self, release: &Release, from: Source<'_>) -> Result<Installed, Error> {
        if self.has(release) {
            return Ok(Installed::Before);
        }
        let versions = self.root.join(release.name.program());
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o755).create(&versions).map_err(disk("make", &versions))?;
        let version = release.version.as_str();
        let lock = versions.join(format!(".{version}.lock"));
        let lock = open_lock(&lock).map_err(disk("lock", &lock))?;
        if self.has(release) {
            return Ok(Installed::Before);
        }
        // Whoever made it died: the lock is ours.
        let draft = versions.join(format!(".new-{version}"));
        remove(&draft)?;
        DirBuilder::new().mode(0o755).create(&draft).map_err(disk("make", &draft))?;
        let made = make(release, from, &draft, &self.confinement)
            .and_then(|()| self.name(release, &draft));
        if made.is_err() {
            // The next one removes it otherwise.
            let _ = remove(&draft);
        }
        drop(lock);
        made.map(|()| Installed::Now)
    }

    fn name(&self, release: &Release, draft: &Path) -> Result<(), Error> {
        let directory = self.directory(release);
        let versions = directory.parent().unwrap_or(&self.root);
        // A damaged one. It leaves its name first, so that it is never half there.
        let gone = versions.join(format!(".gone-{}", release.version.as_str()));
        remove(&gone)?;
        match fs::rename(&directory, &gone) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(disk("replace", &directory)(source)),
        }
        fs::rename(draft, &directory).map_err(disk("name", &directory))?;
        sync(versions)?;
        remove(&gone)
    }

    fn directory(&self, release: &Release) -> PathBuf {
        self.root.join(release.name.program()).join(release.version.as_str())
    }
}

/// Steps 2 to 4.
fn make(
    release: &Release,
    from: Source<'_>,
    draft: &Path,
    confinement: &Confinement,
) -> Result<(), Error> {
    let name = release.archive();
    let expected = expected(release, from, &name)?;
    let packed = draft.join("archive.zip");
    let mut file = create(&packed, 0o600)?;
    let found = from.mirror.copy(&release.in_mirror(&name), LARGEST_ARCHIVE, &mut file)?;
    if found != expected.as_str() {
        let (by, expected) = ("promised", expected.as_str().to_owned());
        return Err(Error::Checksum { archive: name, by, expected, found });
    }
    let path = draft.join(release.name.program());
    let mut program = create(&path, 0o755)?;
    let archive = File::open(&packed).map_err(disk("read", &packed))?;
    let digest = archive::unpack(archive, release.name, &mut program)
        .map_err(|source| Error::Archive { archive: name.clone(), source })?;
    program.sync_all().map_err(disk("write", &path))?;
    drop(program);
    fs::remove_file(&packed).map_err(disk("remove", &packed))?;
    let said = version::of(&path, confinement, &GiveUp::default()).ok();
    if said.as_deref() != Some(release.version.as_str()) {
        return Err(Error::OtherVersion { archive: name, expected: release.to_string() });
    }
    let record = draft.join(DIGEST);
    let mut file = create(&record, 0o644)?;
    let written = file.write_all(digest.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(disk("write", &record))?;
    sync(draft)
}

fn expected(release: &Release, from: Source<'_>, archive: &str) -> Result<Sha256, Error> {
    let sums = match from.mirror.read(&release.in_mirror(&release.sums()), LARGEST_SUMS) {
        Ok(sums) => sums,
        // Then the pinned digest says all.
        Err(mirror::Error::Absent { at }) => {
            return from.pin.cloned().ok_or(Error::Mirror(mirror::Error::Absent { at }));
        }
        Err(error) => return Err(error.into()),
    };
    let listed = checksum::listed(&sums, archive);
    match (listed, from.pin) {
        (None, _) => Err(Error::Unlisted { archive: archive.to_owned() }),
        (Some(listed), Some(pin)) if listed != *pin => Err(Error::Checksum {
            archive: archive.to_owned(),
            by: "pinned",
            expected: pin.as_str().to_owned(),
            found: listed.as_str().to_owned(),
        }),
        (Some(listed), _) => Ok(listed),
    }
}

/// Waits for the lock; the kernel releases that of a process that died.
fn open_lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(path)?;
    loop {
        match flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn create(path: &Path, mode: u32) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(path);
    // Whatever the umask is: a shared cache is read by all its agents.
    let file = file.and_then(|file| {
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        Ok(file)
    });
    file.map_err(disk("make", path))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn sync(directory: &Path) -> Result<(), Error> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(disk("sync", directory))
}

fn disk(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Disk { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use super::super::archive::tests::packed;
    use super::super::mirror::tests::{Answer, Server};
    use super::*;

    /// A program that answers as an engine does.
    fn program(version: &str) -> Vec<u8> {
        format!("#!/bin/sh\necho '{{\"terraform_version\":\"{version}\"}}'\n").into_bytes()
    }

    fn release() -> Release {
        "terraform@1.9.0".parse().unwrap()
    }

    /// A mirror that holds a release, with the digest of its archive.
    fn mirror(of: &Release, says: &str) -> (Server, String) {
        let server = Server::start();
        let archive = packed(&[("LICENSE.txt", b"x"), ("terraform", &program(says))]);
        let digest = digest::of_bytes(&archive);
        let sums = format!("{digest}  {}\n", of.archive());
        server.put_body(&of.in_mirror(&of.archive()), archive);
        server.put_body(&of.in_mirror(&of.sums()), sums);
        (server, digest)
    }

    fn cache_at(root: PathBuf) -> Cache {
        Cache::new(root, Confinement::default())
    }

    fn leftovers(root: &Path) -> Vec<String> {
        let names = fs::read_dir(root.join("terraform")).into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".lock")).collect()
    }

    #[test]
    fn many_that_want_the_same_install_it_once() {
        let (release, dir) = (release(), tempfile::tempdir().unwrap());
        let (server, _) = mirror(&release, "1.9.0");
        let now = thread::scope(|scope| {
            let jobs: Vec<_> = (0..16)
                .map(|_| {
                    scope.spawn(|| {
                        // An agent each.
                        let cache = cache_at(dir.path().to_owned());
                        let mirror = server.mirror();
                        let done =
                            cache.install(&release, Source { mirror: &mirror, pin: None }).unwrap();
                        assert_eq!(
                            version::of(
                                &cache.path(&release),
                                &Confinement::default(),
                                &GiveUp::default()
                            )
                            .unwrap(),
                            "1.9.0"
                        );
                        done
                    })
                })
                .collect();
            let done = jobs.into_iter().map(|job| job.join().unwrap());
            done.filter(|done| *done == Installed::Now).count()
        });
        assert_eq!(now, 1);
        assert_eq!(server.asked(&release.in_mirror(&release.archive())), 1);
        assert_eq!(leftovers(dir.path()), ["1.9.0"]);
        let cache = cache_at(dir.path().to_owned());
        assert_eq!(cache.list(Name::Terraform), [release]);
        assert!(cache.list(Name::Tofu).is_empty());
    }

    #[test]
    fn a_damaged_one_is_installed_again() {
        let (release, dir) = (release(), tempfile::tempdir().unwrap());
        let (server, _) = mirror(&release, "1.9.0");
        let mirror = server.mirror();
        let from = Source { mirror: &mirror, pin: None };
        let cache = cache_at(dir.path().to_owned());
        cache.install(&release, from).unwrap();
        assert_eq!(cache.install(&release, from).unwrap(), Installed::Before);
        // Under the same agent, and found by the next one.
        for next in [cache, cache_at(dir.path().to_owned())] {
            let path = next.path(&release);
            let mut bytes = fs::read(&path).unwrap();
            bytes[20] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert!(!next.has(&release));
            assert_eq!(next.install(&release, from).unwrap(), Installed::Now);
            assert!(next.has(&release));
        }
        assert_eq!(leftovers(dir.path()), ["1.9.0"]);
    }

    #[test]
    fn what_a_crash_leaves_is_never_taken_for_an_engine() {
        let (release, dir) = (release(), tempfile::tempdir().unwrap());
        let (server, _) = mirror(&release, "1.9.0");
        let draft = dir.path().join("terraform/.new-1.9.0");
        fs::create_dir_all(&draft).unwrap();
        fs::write(draft.join("terraform"), "half").unwrap();
        fs::write(draft.join("archive.zip"), "half").unwrap();
        let cache = cache_at(dir.path().to_owned());
        assert!(!cache.has(&release) && cache.list(Name::Terraform).is_empty());
        let mirror = server.mirror();
        cache.install(&release, Source { mirror: &mirror, pin: None }).unwrap();
        assert_eq!(leftovers(dir.path()), ["1.9.0"]);
        // The program without its record is no engine either.
        fs::remove_file(dir.path().join("terraform/1.9.0").join(DIGEST)).unwrap();
        assert!(!cache_at(dir.path().to_owned()).has(&release));
    }

    #[test]
    #[ignore = "not a test: the process that another test kills"]
    fn installing_process() {
        let Some(mirror) = std::env::var_os("MIRROR_OF_TEST") else { return };
        let mirror = Mirror::parse(mirror.to_str().unwrap()).unwrap();
        let cache = cache_at(std::env::var_os("CACHE_OF_TEST").unwrap().into());
        cache.install(&release(), Source { mirror: &mirror, pin: None }).unwrap();
    }

    #[test]
    fn an_agent_that_is_killed_while_it_installs_is_succeeded() {
        let (release, dir) = (release(), tempfile::tempdir().unwrap());
        let (server, _) = mirror(&release, "1.9.0");
        let archive = release.in_mirror(&release.archive());
        let whole = packed(&[("terraform", &program("1.9.0"))]);
        let (told, waits) = mpsc::channel();
        server.put(&archive, Answer::Stalled(Arc::new(whole), told));
        let name = "engine::cache::tests::installing_process";
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .envs([
                ("MIRROR_OF_TEST", server.base.as_ref()),
                ("CACHE_OF_TEST", dir.path().as_os_str()),
            ])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        waits.recv_timeout(Duration::from_secs(60)).expect("the download begins");
        assert!(!cache_at(dir.path().to_owned()).has(&release));
        process.kill().unwrap();
        process.wait().unwrap();
        // Its lock went with it.
        let (server, _) = mirror(&release, "1.9.0");
        let (cache, mirror) = (cache_at(dir.path().to_owned()), server.mirror());
        let done = cache.install(&release, Source { mirror: &mirror, pin: None }).unwrap();
        assert_eq!(done, Installed::Now);
        assert_eq!(leftovers(dir.path()), ["1.9.0"]);
    }

    #[test]
    fn nothing_is_installed_that_was_not_promised() {
        let release = release();
        let (server, digest) = mirror(&release, "1.9.0");
        let (archive, sums) =
            (release.in_mirror(&release.archive()), release.in_mirror(&release.sums()));
        let other = Sha256::parse(&"ab".repeat(32)).unwrap();
        let own = Sha256::parse(&digest).unwrap();
        let listing = |digest: &str| format!("{digest}  {}\n", release.archive()).into_bytes();

        let check = |pin: Option<&Sha256>, text: &str, of_this_host: bool| {
            let dir = tempfile::tempdir().unwrap();
            let cache = cache_at(dir.path().to_owned());
            let mirror = server.mirror();
            let error = cache.install(&release, Source { mirror: &mirror, pin }).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
            assert_eq!(error.is_of_this_host(), of_this_host, "{error}");
            assert!(leftovers(dir.path()).is_empty());
            assert!(!cache.has(&release));
        };
        check(Some(&other), "checksum differs", false);
        server.put_body(&sums, listing(other.as_str()));
        check(None, "checksum differs", false);
        server.put_body(&sums, "nonsense");
        check(None, "list of checksums", false);
        check(Some(&own), "list of checksums", false);
        server.put(&sums, Answer::Status(404));
        check(None, "does not have it", false);
        server.put(&sums, Answer::Status(503));
        check(None, "reach", true);
        server.put_body(&sums, listing(own.as_str()));
        server.put(&archive, Answer::Status(404));
        check(None, "does not have it", false);
        let cut = packed(&[("terraform", &program("1.9.0"))]);
        server.put(&archive, Answer::Cut(Arc::new(cut)));
        check(None, "reach", true);
        let empty = packed(&[("README", b"x")]);
        server.put_body(&sums, listing(&digest::of_bytes(&empty)));
        server.put_body(&archive, empty);
        check(None, "unpack", false);
        let older = packed(&[("terraform", &program("1.8.0"))]);
        server.put_body(&sums, listing(&digest::of_bytes(&older)));
        server.put_body(&archive, older);
        check(None, "does not say terraform 1.9.0", false);
    }

    #[test]
    fn a_pinned_digest_does_without_a_list() {
        let (release, dir) = (release(), tempfile::tempdir().unwrap());
        let (server, digest) = mirror(&release, "1.9.0");
        server.put(&release.in_mirror(&release.sums()), Answer::Status(404));
        let (mirror, pin) = (server.mirror(), Sha256::parse(&digest).unwrap());
        let cache = cache_at(dir.path().to_owned());
        cache.install(&release, Source { mirror: &mirror, pin: Some(&pin) }).unwrap();
        assert!(cache.has(&release));
    }
}

//! Provider packages of this host, kept from one `init` to the next.
//!
//! Terraform's own plugin cache cannot be shared: two `init`s may write the same file, and one
//! without a lock file writes over a provider that another job is running. So every `init` gets a
//! plugin cache of its own, and only this module touches the shared one:
//!
//! ```text
//! <cache>/linux_amd64/<h1 in hex>/package/   the files, never changed once they have this name
//! <cache>/linux_amd64/<h1 in hex>/seen       how they looked when their hash was checked
//! <cache>/linux_amd64/.new-…, .gone-…        being made, being removed
//! ```
//!
//! 1. Before `init`, `lend` links those packages into the private cache whose hash stands in the
//!    configuration's lock file. Terraform takes exactly these and writes over none of them; all
//!    others it fetches into the private cache, since it cannot check them against the lock file.
//! 2. After `init`, `take_in` moves what is new out of the job's reach, computes its hash, and
//!    keeps it if the lock file that terraform has just written has the same: terraform has checked
//!    that package against its publisher's signature or the mirror's word. A link takes its place.
//!
//! A package is named by its content. So a configuration that brings a forged one, with a lock
//! file that fits, harms itself only: nobody else's lock file has that hash.
//!
//! Parallel `lend`s and `take_in`s do not wait for each other: a package appears whole, by a rename.
//! What makes room keeps them out for a moment (`bound.rs`).

mod bound;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest as sha256};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hcl::Expression;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::engine::target;
use crate::{clock, digest, random, untrusted};

/// The scheme of hashes that are computed over unpacked files.
const H1: &str = "h1:";

/// No draft takes so long.
const ABANDONED: SignedDuration = SignedDuration::from_hours(24);

/// A package with more files than any has.
const MOST_FILES: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[error("{what} {path}")]
pub(crate) struct Error {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What one `init` borrows.
#[derive(Debug, Clone)]
pub(crate) struct Loan {
    shared: PathBuf,
    private: PathBuf,
    lock_file: PathBuf,
    /// In bytes; 0 for none.
    limit: u64,
}

/// A provider of a lock file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Locked {
    /// `registry.terraform.io/hashicorp/aws/5.0.0`
    path: PathBuf,
    /// The `h1` hashes, as the names of packages.
    hashes: Vec<String>,
}

/// How a file looked: whatever writes to it changes its `ctime`, which nobody can set back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Look {
    name: String,
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl Loan {
    /// `shared` is the host's, `private` the plugin cache of one `init`, and `lock_file` what the
    /// configuration has or will have. The host's is held to `limit` bytes; 0 is no limit.
    pub(crate) fn new(shared: PathBuf, private: PathBuf, lock_file: PathBuf, limit: u64) -> Self {
        Self { shared: shared.join(target()), private, lock_file, limit }
    }

    /// Fills the private cache, and answers with how many packages.
    pub(crate) fn lend(&self) -> Result<usize, Error> {
        make(&self.shared)?;
        make(&self.private)?;
        self.sweep();
        let held = bound::hold(&self.shared)?;
        let mut found = Vec::new();
        for Locked { path, hashes } in self.locked()? {
            let kept = hashes.into_iter().find(|hash| self.is_whole(hash));
            found.extend(kept.map(|kept| (path, kept)));
        }
        let packages: Vec<_> = found.iter().map(|(_, kept)| kept.clone()).collect();
        if held.is_some() {
            bound::record(&self.shared, &self.private, &packages)?;
        }
        let mut lent = 0;
        for (path, kept) in &found {
            let provider = self.private.join(path);
            make(&provider)?;
            let link = provider.join(target());
            match symlink(self.package(kept), &link) {
                Ok(()) => lent += 1,
                // An earlier `init` of the job.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(failed("link", &link)(source)),
            }
        }
        Ok(lent)
    }

    /// Removes what processes that were killed left unfinished.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.shared).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            let is_draft = name.starts_with(b".new-") || name.starts_with(b".gone-");
            let changed = entry.metadata().and_then(|metadata| metadata.modified());
            let changed = changed.ok().and_then(|changed| Timestamp::try_from(changed).ok());
            let is_old = changed.is_some_and(|at| clock::now().duration_since(at) > ABANDONED);
            // Another may be removing it, too.
            if is_draft && is_old && fs::remove_dir_all(entry.path()).is_ok() {
                tracing::info!(draft = %entry.path().display(), "removed an abandoned draft");
            }
        }
    }

    /// Keeps what `init` has fetched, and answers how many packages that were. Then makes room.
    pub(crate) fn take_in(&self) -> Result<usize, Error> {
        let kept = self.take_in_all()?;
        if let Err(error) = bound::shrink(&self.shared, self.limit) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "failed to hold the provider cache to its limit");
        }
        Ok(kept)
    }

    fn take_in_all(&self) -> Result<usize, Error> {
        let _held = bound::hold(&self.shared)?;
        let mut kept = 0;
        for locked in self.locked()? {
            let at = self.private.join(&locked.path).join(target());
            // A link is one of ours, or leads into the configuration's own directory.
            let is_new = fs::symlink_metadata(&at).is_ok_and(|metadata| metadata.is_dir());
            // Nothing on the way may lead elsewhere: the job could write all of it.
            let is_here = fs::canonicalize(&at).is_ok_and(|found| {
                fs::canonicalize(&self.private).is_ok_and(|private| found.starts_with(private))
            });
            if is_new && is_here && self.keep(&at, &locked.hashes)? {
                kept += 1;
            }
        }
        Ok(kept)
    }

    fn keep(&self, at: &Path, hashes: &[String]) -> Result<bool, Error> {
        let draft = self.shared.join(format!(".new-{}", &random::token()[..16]));
        make(&draft)?;
        let package = draft.join("package");
        match fs::rename(at, &package) {
            Ok(()) => {}
            Err(error) => {
                let _ = fs::remove_dir(&draft);
                // A cache on another disk than the work directory.
                if error.kind() == io::ErrorKind::CrossesDevices {
                    tracing::warn!("the provider cache is on another disk: nothing is kept in it");
                    return Ok(false);
                }
                return Err(failed("take in", at)(error));
            }
        }
        let known = self.name(&draft, &package, hashes);
        let place = match &known {
            Ok(Some(hash)) => self.package(hash),
            // The job needs it all the same.
            Ok(None) | Err(_) => {
                fs::rename(&package, at).map_err(failed("give back", at))?;
                remove(&draft)?;
                return known.map(|_| false);
            }
        };
        symlink(&place, at).map_err(failed("link", at))?;
        if let Ok(Some(hash)) = &known {
            // The lock is held since before it had its name.
            bound::record(&self.shared, &self.private, std::slice::from_ref(hash))?;
        }
        Ok(true)
    }

    /// Gives the draft the name of its hash, if that is one of those the lock file has.
    fn name(
        &self,
        draft: &Path,
        package: &Path,
        hashes: &[String],
    ) -> Result<Option<String>, Error> {
        let Ok(files) = files(package) else { return Ok(None) };
        for file in &files {
            let path = package.join(file);
            let settle = || {
                let mode = fs::symlink_metadata(&path)?.permissions().mode();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o555))?;
                File::open(&path)?.sync_all()
            };
            settle().map_err(failed("settle", &path))?;
        }
        let hash = hash(package, &files).map_err(failed("read", package))?;
        if !hashes.contains(&hash) {
            tracing::warn!(hash, "a provider package is not the one of the lock file: not kept");
            return Ok(None);
        }
        if self.is_whole(&hash) {
            remove(draft)?;
            return Ok(Some(hash));
        }
        note(draft, &look(package, &files).map_err(failed("read", package))?)?;
        sync(package)?;
        sync(draft)?;
        match fs::rename(draft, self.shared.join(&hash)) {
            Ok(()) => sync(&self.shared)?,
            // Another was faster with the same.
            Err(_) if self.is_whole(&hash) => remove(draft)?,
            Err(source) => return Err(failed("name", draft)(source)),
        }
        Ok(Some(hash))
    }

    /// Tells whether a package is there, undamaged. Removes a damaged one.
    fn is_whole(&self, hash: &str) -> bool {
        let directory = self.shared.join(hash);
        let package = directory.join("package");
        let Ok(files) = files(&package) else { return false };
        let Ok(found) = look(&package, &files) else { return false };
        let seen = fs::read(directory.join("seen")).ok();
        let seen = seen.and_then(|bytes| serde_json::from_slice::<Vec<Look>>(&bytes).ok());
        if seen.as_ref() == Some(&found) {
            return true;
        }
        // Copied from elsewhere, perhaps.
        if self::hash(&package, &files).is_ok_and(|found| found == hash) {
            if let Err(error) = note(&directory, &found) {
                tracing::debug!(error = &error as &dyn std::error::Error, "no note of a package");
            }
            return true;
        }
        tracing::warn!(hash, "a provider package of the cache is damaged: it is removed");
        let gone = self.shared.join(format!(".gone-{}", &random::token()[..16]));
        if fs::rename(&directory, &gone).is_ok() {
            let _ = remove(&gone);
        }
        false
    }

    fn package(&self, hash: &str) -> PathBuf {
        self.shared.join(hash).join("package")
    }

    fn locked(&self) -> Result<Vec<Locked>, Error> {
        let text = untrusted::read(&self.lock_file).map_err(failed("read", &self.lock_file))?;
        Ok(text.map(|text| locked(&String::from_utf8_lossy(&text))).unwrap_or_default())
    }
}

/// Reads the providers of a lock file. What is not understood is left to terraform.
fn locked(text: &str) -> Vec<Locked> {
    let Ok(body) = hcl::parse(text) else { return Vec::new() };
    let blocks = body.blocks().filter(|block| block.identifier() == "provider");
    let providers = blocks.filter_map(|block| {
        let source = block.labels().first()?.as_str();
        let attribute = |name: &str| {
            let mut all = block.body().attributes();
            all.find(|attribute| attribute.key() == name).map(|attribute| attribute.expr())
        };
        let Some(Expression::String(version)) = attribute("version") else { return None };
        let Some(Expression::Array(hashes)) = attribute("hashes") else { return None };
        let hashes = hashes.iter().filter_map(|hash| match hash {
            Expression::String(hash) => name_of(hash),
            _ => None,
        });
        let path = Path::new(source).join(version);
        let plain = path.components().count() == 4
            && path.components().all(|part| matches!(part, Component::Normal(_)))
            && source.split('/').count() == 3
            && !version.contains('/');
        plain.then(|| Locked { path, hashes: hashes.collect() })
    });
    providers.collect()
}

/// Turns `h1:…` into the name of a package.
fn name_of(hash: &str) -> Option<String> {
    let bytes = STANDARD.decode(hash.strip_prefix(H1)?).ok()?;
    (bytes.len() == 32).then(|| hex::encode(bytes))
}

/// Lists the regular files of a package, as Go sorts them. Whatever is none makes it no package.
fn files(package: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(below) = directories.pop() {
        for entry in fs::read_dir(package.join(&below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            let kind = entry.file_type()?;
            let name = path.to_str().filter(|name| !name.contains('\n'));
            match name {
                Some(_) if kind.is_dir() => directories.push(path),
                Some(name) if kind.is_file() && found.len() < MOST_FILES => {
                    found.push(name.to_owned());
                }
                Some(_) | None => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }
    if found.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    found.sort_unstable();
    Ok(found)
}

/// Computes `h1`: the digest of all files' digests and names.
fn hash(package: &Path, files: &[String]) -> io::Result<String> {
    let mut summary = String::new();
    for name in files {
        summary += &format!("{}  {name}\n", digest::of_file(&package.join(name))?);
    }
    Ok(hex::encode(sha256(&SHA256, summary.as_bytes())))
}

fn look(package: &Path, files: &[String]) -> io::Result<Vec<Look>> {
    let look = |name: &String| {
        let metadata = fs::symlink_metadata(package.join(name))?;
        Ok(Look {
            name: name.clone(),
            inode: metadata.ino(),
            length: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    };
    files.iter().map(look).collect()
}

fn note(directory: &Path, look: &[Look]) -> Result<(), Error> {
    let bytes = serde_json::to_vec(look).unwrap_or_default();
    let draft = directory.join(format!("seen-{}", &random::token()[..16]));
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&draft, directory.join("seen"))
    };
    write().map_err(failed("write", &draft))
}

fn make(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed("make", path))
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_dir_all(path).map_err(failed("remove", path))
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(failed("sync", path))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error { what, path, source }
}

#[cfg(test)]
pub(crate) mod tests;

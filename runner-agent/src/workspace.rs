//! Archives in, workspace out and in.
//!
//! After the plan the working directory is sealed: a gzipped tar that holds `work/…` (with
//! `.terraform`, without its `providers`, which are fetched again) and `plan.bin` beside it. It
//! is deterministic: sorted, without times or owners. Links are kept only when they stay inside;
//! sockets and devices are left out.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header};

use crate::digest::Digester;
use crate::extract::{self, Problem, checked_path, link_stays_inside};
use crate::job_directory::create_private;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("seal the workspace: {path}")]
    Pack {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("seal the workspace: {path:?} {problem}")]
    Refused { path: PathBuf, problem: Problem },
    #[error("seal the workspace: it has more than {entries} files or {bytes} bytes")]
    TooLarge { entries: usize, bytes: u64 },
}

/// What became an archive.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) digest: String,
    /// Links that lead outside, and what is neither file nor directory: the apply will not have
    /// them.
    pub(crate) left_out: Vec<PathBuf>,
}

/// Seals `<directory>/work` and `<directory>/plan.bin` into `to`.
pub(crate) fn pack(directory: &Path, working_directory: &Path, to: &Path) -> Result<Packed, Error> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Pack { path, source }
    };
    let file = create_private(to).map_err(at(to))?;
    let digesting = Digesting { inner: BufWriter::new(file), digester: Digester::new() };
    let gzip = GzEncoder::new(digesting, Compression::fast());
    let mut packer = Packer {
        builder: Builder::new(gzip),
        base: directory.to_owned(),
        leave_out: Path::new("work").join(working_directory).join(".terraform/providers"),
        entries: 0,
        bytes: 0,
        left_out: Vec::new(),
    };
    packer.add(Path::new("plan.bin"))?;
    packer.add(Path::new("work"))?;
    let left_out = std::mem::take(&mut packer.left_out);
    let finish = || {
        let mut digesting = packer.builder.into_inner()?.finish()?;
        digesting.inner.flush()?;
        digesting.inner.get_ref().sync_all()?;
        Ok(Packed { digest: digesting.digester.finish(), left_out })
    };
    finish().map_err(at(to))
}

struct Packer<W: Write> {
    builder: Builder<W>,
    base: PathBuf,
    leave_out: PathBuf,
    entries: usize,
    bytes: u64,
    left_out: Vec<PathBuf>,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path) -> Result<(), Error> {
        if path == self.leave_out {
            return Ok(());
        }
        let full = self.base.join(path);
        let failed = |source| Error::Pack { path: full.clone(), source };
        let metadata = fs::symlink_metadata(&full).map_err(failed)?;
        let taken = metadata.is_dir() || metadata.is_file() || metadata.is_symlink();
        if taken {
            // What the apply would refuse, the plan refuses.
            checked_path(path.as_os_str().as_bytes())
                .map_err(|problem| Error::Refused { path: path.to_owned(), problem })?;
        }
        let mut header = Header::new_gnu();
        header.set_mtime(0);
        header.set_size(0);
        header.set_mode(0o600 | (metadata.permissions().mode() & 0o100));
        if metadata.is_dir() {
            self.count(0)?;
            header.set_entry_type(EntryType::Directory);
            header.set_mode(0o700);
            self.builder.append_data(&mut header, path, io::empty()).map_err(failed)?;
            let mut names = Vec::new();
            for entry in fs::read_dir(&full).map_err(failed)? {
                names.push(entry.map_err(failed)?.file_name());
            }
            names.sort();
            for name in names {
                self.add(&path.join(name))?;
            }
        } else if metadata.is_symlink() {
            let target = fs::read_link(&full).map_err(failed)?;
            // One level less than the path has: a link must not leave `work` either.
            let depth = path.components().count().saturating_sub(2);
            if target.to_str().is_some() && link_stays_inside(depth, &target) {
                self.count(0)?;
                header.set_entry_type(EntryType::Symlink);
                self.builder.append_link(&mut header, path, &target).map_err(failed)?;
            } else {
                self.left_out.push(path.to_owned());
            }
        } else if metadata.is_file() {
            let file = File::options()
                .read(true)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(&full)
                .map_err(failed)?;
            let size = file.metadata().map_err(failed)?.len();
            self.count(size)?;
            header.set_entry_type(EntryType::Regular);
            header.set_size(size);
            self.builder.append_data(&mut header, path, file).map_err(failed)?;
        } else {
            self.left_out.push(path.to_owned());
        }
        Ok(())
    }

    /// Holds the archive to what the apply will accept.
    fn count(&mut self, bytes: u64) -> Result<(), Error> {
        let limits = extract::WORKSPACE;
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.entries > limits.entries || self.bytes > limits.bytes {
            return Err(Error::TooLarge { entries: limits.entries, bytes: limits.bytes });
        }
        Ok(())
    }
}

struct Digesting<W> {
    inner: W,
    digester: Digester,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.digester.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::digest;

    fn filled() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work/envs/prod");
        fs::create_dir_all(work.join(".terraform/providers/x")).unwrap();
        fs::create_dir_all(work.join(".terraform/modules")).unwrap();
        fs::create_dir_all(dir.path().join("work/empty")).unwrap();
        fs::write(work.join(".terraform/providers/x/big"), "binary").unwrap();
        fs::write(work.join(".terraform/modules/modules.json"), "{}").unwrap();
        fs::write(work.join("main.tf"), "a").unwrap();
        fs::write(dir.path().join("plan.bin"), "plan").unwrap();
        symlink("main.tf", work.join("inside")).unwrap();
        symlink("../../../plan.bin", work.join("outside")).unwrap();
        symlink("/etc/passwd", work.join("absolute")).unwrap();
        dir
    }

    #[test]
    fn a_workspace_is_restored_as_it_was_without_providers_and_outer_links() {
        let dir = filled();
        let archive = dir.path().join("workspace.tar.gz");
        let packed = pack(dir.path(), Path::new("envs/prod"), &archive).unwrap();
        assert_eq!(packed.digest, digest::of_file(&archive).unwrap());
        let left_out = ["absolute", "outside"].map(|name| Path::new("work/envs/prod").join(name));
        assert_eq!(packed.left_out, left_out);

        let into = tempfile::tempdir().unwrap();
        extract::extract(File::open(&archive).unwrap(), into.path(), extract::WORKSPACE).unwrap();
        let work = into.path().join("work/envs/prod");
        assert_eq!(fs::read_to_string(into.path().join("plan.bin")).unwrap(), "plan");
        assert_eq!(fs::read_to_string(work.join("inside")).unwrap(), "a");
        assert!(work.join(".terraform/modules/modules.json").exists());
        assert!(into.path().join("work/empty").is_dir());
        for absent in [".terraform/providers", "outside", "absolute"] {
            assert!(fs::symlink_metadata(work.join(absent)).is_err(), "{absent}");
        }
    }

    #[test]
    fn the_same_directory_has_the_same_digest() {
        let (a, b) = (filled(), filled());
        let seal = |dir: &tempfile::TempDir| {
            pack(dir.path(), Path::new("envs/prod"), &dir.path().join("w")).unwrap().digest
        };
        assert_eq!(seal(&a), seal(&b));
        fs::write(a.path().join("work/envs/prod/main.tf"), "b").unwrap();
        assert_ne!(seal(&a), seal(&b));
    }

    #[test]
    fn what_an_apply_would_refuse_is_not_packed() {
        let deep = "d/".repeat(70);
        let long = format!("{0}/{0}/{0}/{0}/{0}", "x".repeat(250));
        let bad = OsStr::from_bytes(b"bad-\xff");
        for name in [OsStr::new(&deep), OsStr::new(&long), bad] {
            let dir = filled();
            fs::create_dir_all(dir.path().join("work").join(name)).unwrap();
            let packed = pack(dir.path(), Path::new(""), &dir.path().join("w"));
            assert!(matches!(packed, Err(Error::Refused { .. })), "{packed:?}");
        }
    }
}

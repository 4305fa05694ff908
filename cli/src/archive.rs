//! Packs a directory of Terraform files for upload: a gzipped tar that is the same, byte for
//! byte, whenever the files are. Links inside the root are replaced by what they point to, since
//! the control plane refuses links; those that lead outside are refused here, by name, and so is
//! everything over the control plane's caps, before any byte is sent.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::{Compression, GzBuilder, write::GzEncoder};
use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("open the directory {}", .path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("understand {}", .path.display())]
    Ignore { path: PathBuf, source: ignore::Error },
    #[error("follow the link {} out of the directory, to {}", .path.display(), .target.display())]
    LinkOutside { path: PathBuf, target: PathBuf },
    #[error("follow the link {}: it leads to a directory that contains it", .path.display())]
    LinkCycle { path: PathBuf },
    #[error("pack {}: it is neither a file, a directory nor a link", .path.display())]
    Special { path: PathBuf },
    #[error("pack {}: its name is not UTF-8", .path.display())]
    Name { path: PathBuf },
    #[error("pack {}: it changed while it was read", .path.display())]
    Changed { path: PathBuf },
    #[error("pack more than {} entries; {} is the next", .cap, .path.display())]
    Entries { cap: u64, path: PathBuf },
    #[error("pack more than {} MiB of files; {} is the next", .cap >> 20, .path.display())]
    Unpacked { cap: u64, path: PathBuf },
    #[error("pack into less than {} MiB", .cap >> 20)]
    Packed { cap: u64 },
    #[error("pack anything: there is no file in {}", .path.display())]
    Empty { path: PathBuf },
    #[error("compress")]
    Compress(#[source] io::Error),
}

impl Error {
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Error::LinkOutside { .. }
            | Error::LinkCycle { .. }
            | Error::Special { .. }
            | Error::Name { .. } => {
                Some("copy it into the directory, or leave it out with `.terraformignore`".into())
            }
            Error::Entries { .. } | Error::Unpacked { .. } | Error::Packed { .. } => {
                Some("leave what terraform does not need out with `.terraformignore`".into())
            }
            Error::Changed { .. } => Some("repeat when nothing writes to the directory".into()),
            Error::Root { .. } => Some("`latchkey queue ENV DIR` packs DIR".into()),
            Error::Empty { .. } => Some("check DIR and `.terraformignore`".into()),
            Error::Read { .. } | Error::Ignore { .. } | Error::Compress(_) => None,
        }
    }
}

/// What the control plane takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    pub(crate) packed: u64,
    pub(crate) unpacked: u64,
    pub(crate) entries: u64,
}

pub(crate) const CAPS: Caps = Caps { packed: 64 << 20, unpacked: 512 << 20, entries: 20_000 };

/// Packs `root` and returns the archive.
pub(crate) fn pack(root: &Path, caps: Caps) -> Result<Vec<u8>, Error> {
    let opened = |source| Error::Root { path: root.to_owned(), source };
    let real = fs::canonicalize(root).map_err(opened)?;
    if !real.is_dir() {
        return Err(opened(io::ErrorKind::NotADirectory.into()));
    }
    let gzip = GzBuilder::new().write(Vec::new(), Compression::default());
    let mut packer = Packer {
        ignored: read_ignore_file(&real)?,
        tar: tar::Builder::new(Capped { gzip, packed: caps.packed }),
        open: vec![real.clone()],
        root: real.clone(),
        caps,
        entries: 0,
        unpacked: 0,
        files: 0,
    };
    packer.directory(&real, Path::new(""))?;
    if packer.files == 0 {
        return Err(Error::Empty { path: root.to_owned() });
    }
    let capped = packer.tar.into_inner().map_err(|source| compressed(source, caps))?;
    let packed = capped.gzip.finish().map_err(Error::Compress)?;
    if packed.len() as u64 > caps.packed {
        return Err(Error::Packed { cap: caps.packed });
    }
    Ok(packed)
}

struct Packer {
    root: PathBuf,
    ignored: Gitignore,
    tar: tar::Builder<Capped>,
    caps: Caps,
    entries: u64,
    unpacked: u64,
    files: u64,
    /// The real directories that are being read, from the root down: what a link must not lead
    /// back to.
    open: Vec<PathBuf>,
}

impl Packer {
    /// Packs what is in `real`, which appears as `shown` in the archive.
    fn directory(&mut self, real: &Path, shown: &Path) -> Result<(), Error> {
        let failed = |source| Error::Read { path: self.display(shown), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(real).map_err(failed)? {
            names.push(entry.map_err(failed)?.file_name());
        }
        names.sort();
        for name in names {
            self.entry(&real.join(&name), &shown.join(&name))?;
        }
        Ok(())
    }

    fn entry(&mut self, real: &Path, shown: &Path) -> Result<(), Error> {
        let failed = |source| Error::Read { path: shown.to_owned(), source };
        let mut real = real.to_owned();
        let mut facts = fs::symlink_metadata(&real).map_err(failed)?;
        let linked = facts.is_symlink();
        if linked {
            // A link that is left out may lead anywhere, or nowhere.
            if self.is_ignored(shown, fs::metadata(&real).is_ok_and(|facts| facts.is_dir())) {
                return Ok(());
            }
            real = fs::canonicalize(&real).map_err(failed)?;
            if !real.starts_with(&self.root) {
                return Err(Error::LinkOutside { path: shown.to_owned(), target: real });
            }
            facts = fs::symlink_metadata(&real).map_err(failed)?;
        }
        if self.is_ignored(shown, facts.is_dir()) {
            return Ok(());
        }
        if shown.to_str().is_none() {
            return Err(Error::Name { path: shown.to_owned() });
        }
        if facts.is_dir() {
            if linked && self.open.contains(&real) {
                return Err(Error::LinkCycle { path: shown.to_owned() });
            }
            self.count(shown, 0)?;
            self.append(shown, tar::EntryType::Directory, 0o755, 0, io::empty())?;
            self.open.push(real.clone());
            self.directory(&real, shown)?;
            self.open.pop();
            Ok(())
        } else if facts.is_file() {
            self.file(&real, shown)
        } else {
            Err(Error::Special { path: shown.to_owned() })
        }
    }

    fn file(&mut self, real: &Path, shown: &Path) -> Result<(), Error> {
        let failed = |source| Error::Read { path: shown.to_owned(), source };
        let file = File::open(real).map_err(failed)?;
        let facts: Metadata = file.metadata().map_err(failed)?;
        self.count(shown, facts.len())?;
        let mode = if facts.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
        let mut content = Content { file: file.take(facts.len()), read: 0, failed: None };
        self.append(shown, tar::EntryType::Regular, mode, facts.len(), &mut content)?;
        self.files += 1;
        if let Some(source) = content.failed {
            return Err(failed(source));
        }
        if content.read != facts.len() {
            return Err(Error::Changed { path: shown.to_owned() });
        }
        Ok(())
    }

    /// Counts one entry against the caps, before it is read.
    fn count(&mut self, shown: &Path, size: u64) -> Result<(), Error> {
        self.entries += 1;
        self.unpacked = self.unpacked.saturating_add(size);
        if self.entries > self.caps.entries {
            return Err(Error::Entries { cap: self.caps.entries, path: shown.to_owned() });
        }
        if self.unpacked > self.caps.unpacked {
            return Err(Error::Unpacked { cap: self.caps.unpacked, path: shown.to_owned() });
        }
        Ok(())
    }

    /// Appends with a header that tells nothing of this machine or moment.
    fn append(
        &mut self,
        shown: &Path,
        kind: tar::EntryType,
        mode: u32,
        size: u64,
        content: impl Read,
    ) -> Result<(), Error> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        self.tar
            .append_data(&mut header, shown, content)
            .map_err(|source| compressed(source, self.caps))
    }

    /// Tells whether an entry stays out: what `.terraformignore` says, else the defaults.
    fn is_ignored(&self, shown: &Path, is_dir: bool) -> bool {
        match self.ignored.matched(shown, is_dir) {
            Match::Ignore(_) => true,
            Match::Whitelist(_) => false,
            Match::None => is_left_out_by_default(shown, is_dir),
        }
    }

    fn display(&self, shown: &Path) -> PathBuf {
        if shown.as_os_str().is_empty() { self.root.clone() } else { shown.to_owned() }
    }
}

/// `.git/` and `.terraform/` but for `.terraform/modules/`, at any depth, as terraform's own
/// remote runs leave them out.
fn is_left_out_by_default(shown: &Path, is_dir: bool) -> bool {
    let mut names = shown.components().map(|part| part.as_os_str()).peekable();
    while let Some(name) = names.next() {
        let dir = names.peek().is_some() || is_dir;
        if name == ".git" && dir {
            return true;
        }
        if name == ".terraform"
            && let Some(below) = names.peek()
            && *below != "modules"
        {
            return true;
        }
    }
    false
}

fn read_ignore_file(root: &Path) -> Result<Gitignore, Error> {
    let path = root.join(".terraformignore");
    let failed = |source| Error::Ignore { path: PathBuf::from(".terraformignore"), source };
    // Built for the empty root: entries are matched by their path inside the archive.
    let mut rules = GitignoreBuilder::new("");
    match fs::read_to_string(&path) {
        Ok(text) => {
            for line in text.lines() {
                rules.add_line(None, line).map_err(failed)?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Read { path, source }),
    }
    rules.build().map_err(failed)
}

/// Tells what a failed append was: ours when the cap was reached.
fn compressed(source: io::Error, caps: Caps) -> Error {
    if source.kind() == io::ErrorKind::StorageFull {
        return Error::Packed { cap: caps.packed };
    }
    Error::Compress(source)
}

/// Refuses to grow beyond the cap, so that a huge directory fails early.
struct Capped {
    gzip: GzEncoder<Vec<u8>>,
    packed: u64,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.gzip.get_ref().len() as u64 > self.packed {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.gzip.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.gzip.flush()
    }
}

/// Counts what a file gave, and fills up with zeros when it gave less than it promised, so that
/// the tar stays whole until the change is noticed.
struct Content {
    file: io::Take<File>,
    read: u64,
    failed: Option<io::Error>,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.file.read(buffer) {
            Ok(count) => {
                self.read += count as u64;
                Ok(count)
            }
            Err(error) => {
                self.failed = Some(error);
                Ok(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Tree {
            let tree = Tree(tempfile::tempdir().unwrap());
            for (path, text) in files {
                let path = tree.0.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            tree
        }

        fn link(&self, target: impl AsRef<Path>, path: &str) {
            symlink(target, self.0.path().join(path)).unwrap();
        }

        fn pack(&self) -> Result<Vec<u8>, Error> {
            pack(self.0.path(), CAPS)
        }

        /// Packs and returns path to content; directories have none.
        fn packed(&self) -> BTreeMap<String, Option<String>> {
            let packed = self.pack().unwrap();
            let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(packed.as_slice()));
            let mut found = BTreeMap::new();
            for entry in archive.entries().unwrap() {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().to_str().unwrap().to_owned();
                let kind = entry.header().entry_type();
                assert!(kind.is_file() || kind.is_dir(), "{path}");
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                found.insert(path, kind.is_file().then_some(text));
            }
            found
        }
    }

    fn names(tree: &Tree) -> Vec<String> {
        tree.packed().into_iter().filter(|(_, text)| text.is_some()).map(|(path, _)| path).collect()
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        let files = [("main.tf", "a"), ("modules/x/main.tf", "b"), (".terraform.lock.hcl", "c")];
        let mut other = files;
        other.reverse();
        assert_eq!(Tree::new(&files).pack().unwrap(), Tree::new(&other).pack().unwrap());
    }

    #[test]
    fn defaults_leave_out_git_and_terraform_but_its_modules() {
        let tree = Tree::new(&[
            ("main.tf", ""),
            (".git/config", ""),
            (".gitignore", ""),
            (".terraform/providers/p", ""),
            (".terraform/terraform.tfstate", ""),
            (".terraform/modules/modules.json", ""),
            ("sub/.terraform/environment", ""),
            (".terraform.lock.hcl", ""),
        ]);
        assert_eq!(
            names(&tree),
            [".gitignore", ".terraform.lock.hcl", ".terraform/modules/modules.json", "main.tf"]
        );
    }

    #[test]
    fn the_ignore_file_adds_and_takes_back() {
        let tree = Tree::new(&[
            (".terraformignore", "*.secret\nbig/\n!keep.secret\n!.terraform/environment\n"),
            ("main.tf", ""),
            ("a.secret", ""),
            ("keep.secret", ""),
            ("big/file", ""),
            (".terraform/environment", ""),
            (".terraform/other", ""),
        ]);
        assert_eq!(
            names(&tree),
            [".terraform/environment", ".terraformignore", "keep.secret", "main.tf"]
        );
    }

    #[test]
    fn links_inside_become_what_they_point_to() {
        let tree = Tree::new(&[("main.tf", "x"), ("shared/v.tf", "v")]);
        tree.link("main.tf", "copy.tf");
        tree.link("shared", "linked");
        let packed = tree.packed();
        assert_eq!(packed["copy.tf"].as_deref(), Some("x"));
        assert_eq!(packed["linked/v.tf"].as_deref(), Some("v"));
    }

    #[test]
    fn links_that_lead_outside_are_refused_by_name() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let tree = Tree::new(&[("main.tf", ""), ("d/x", "")]);
        tree.link(outside.path().join("secret"), "d/out");
        let error = tree.pack().unwrap_err();
        assert!(matches!(error, Error::LinkOutside { .. }));
        assert!(error.to_string().contains("d/out"), "{error}");

        let ignored = Tree::new(&[("main.tf", ""), (".terraformignore", "out\n")]);
        ignored.link(outside.path().join("secret"), "out");
        assert_eq!(names(&ignored), [".terraformignore", "main.tf"]);
    }

    #[test]
    fn links_in_a_circle_and_broken_links_are_refused() {
        let tree = Tree::new(&[("main.tf", ""), ("d/x", "")]);
        tree.link("..", "d/up");
        assert!(matches!(tree.pack(), Err(Error::LinkCycle { .. })));
        let tree = Tree::new(&[("main.tf", "")]);
        tree.link("nowhere", "broken");
        assert!(matches!(tree.pack(), Err(Error::Read { .. })));
    }

    #[test]
    fn caps_hold() {
        let text = "y".repeat(5000);
        let tree = Tree::new(&[("a.tf", &text), ("b.tf", &text), ("c.tf", "")]);
        let with = |caps| pack(tree.0.path(), caps).unwrap_err();
        assert!(matches!(with(Caps { entries: 2, ..CAPS }), Error::Entries { .. }));
        assert!(matches!(with(Caps { unpacked: 9999, ..CAPS }), Error::Unpacked { .. }));
        assert!(matches!(with(Caps { packed: 20, ..CAPS }), Error::Packed { .. }));
        pack(tree.0.path(), Caps { entries: 3, unpacked: 10_000, packed: 4096 }).unwrap();
    }

    #[test]
    fn an_empty_directory_and_a_missing_one_are_refused() {
        assert!(matches!(Tree::new(&[]).pack(), Err(Error::Empty { .. })));
        assert!(matches!(pack(Path::new("/nonexistent"), CAPS), Err(Error::Root { .. })));
    }
}

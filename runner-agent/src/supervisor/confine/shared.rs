//! What lies around the hidden directory and what jobs share: which of it jobs have.
//!
//! At each ancestor of either, everything but the way to it is allowed. The ancestor itself is not
//! (that would allow all below), so nothing new can be made or renamed directly in one. Where it
//! leads to nothing hidden it can at least be read.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::process::geteuid;

use super::Error;

/// As many as the kernel follows.
const MOST_LINKS: usize = 40;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    pub(super) all: Vec<PathBuf>,
    pub(super) read: Vec<PathBuf>,
}

impl Around {
    pub(super) fn of(hidden: &Path, shared: &[PathBuf], own: &[PathBuf]) -> Result<Self, Error> {
        let look = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Look { path, source }
        };
        let mut roots: Vec<PathBuf> = places(hidden).map_err(look(hidden))?;
        let hidden = roots.pop().unwrap_or_default();
        let mut read = Vec::new();
        for path in shared {
            let places = places(path).map_err(look(path))?;
            // Never what the hidden directory lies in.
            read.extend(places.last().filter(|place| !hidden.starts_with(place)).cloned());
            roots.extend(places);
        }
        roots.retain(|root| !root.starts_with(&hidden) && may_be_replaced(root));
        roots.push(hidden.clone());
        let ancestors = roots.iter().flat_map(|root| root.ancestors().skip(1));
        let ancestors: BTreeSet<PathBuf> = ancestors.map(Path::to_owned).collect();
        let mut all = Vec::new();
        for ancestor in &ancestors {
            if roots.iter().any(|root| ancestor.starts_with(root)) {
                continue;
            }
            if !hidden.starts_with(ancestor) && ancestor != Path::new(SHARED_TMP) {
                read.push(ancestor.clone());
            }
            let entries = match fs::read_dir(ancestor) {
                Ok(entries) => entries,
                // The job could not, either. Or it is still to be made.
                Err(error) if is_out_of_reach(&error) => continue,
                Err(source) => return Err(look(ancestor)(source)),
            };
            for entry in entries {
                let entry = entry.map_err(look(ancestor))?;
                let path = entry.path();
                // What a link leads to is allowed by itself, or not: it may be the hidden one.
                let link = entry.file_type().map_err(look(&path))?.is_symlink();
                let foreign = is_tmpdir_of_a_job(&path) && !own.contains(&path);
                let on_the_way = roots.iter().any(|root| root.starts_with(&path));
                if !link && !foreign && !on_the_way {
                    all.push(path);
                }
            }
        }
        Ok(Self { all, read })
    }
}

fn is_out_of_reach(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

/// Answers where a path leads, and before it the links on the way: whoever replaces one of them
/// replaces what is found.
pub(in super::super) fn places(path: &Path) -> io::Result<Vec<PathBuf>> {
    let components = |path: &Path| -> Vec<OsString> {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
    };
    let mut places = Vec::new();
    let mut rest = components(path);
    let mut at = PathBuf::from("/");
    while let Some(part) = rest.pop() {
        if part == Component::ParentDir.as_os_str() {
            at.pop();
            continue;
        }
        if part == Component::CurDir.as_os_str() {
            continue;
        }
        let next = at.join(part);
        match fs::read_link(&next) {
            Ok(target) => {
                places.push(next);
                if places.len() > MOST_LINKS {
                    return Err(io::Error::from(rustix::io::Errno::LOOP));
                }
                rest.extend(components(&target));
            }
            // It is no link, or not there yet.
            Err(_) => at = next,
        }
    }
    places.push(at);
    Ok(places)
}

/// Tells whether the runner's user could write, replace or move it.
fn may_be_replaced(place: &Path) -> bool {
    let user = geteuid().as_raw();
    place.ancestors().any(|at| {
        let owned = fs::symlink_metadata(at).is_ok_and(|metadata| metadata.uid() == user);
        owned || access(at, Access::WRITE_OK).is_ok()
    })
}

const SHARED_TMP: &str = "/tmp";

/// Tells the directories for temporary files of jobs whose own path is too long.
fn is_tmpdir_of_a_job(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    path.parent() == Some(Path::new(SHARED_TMP))
        && name.is_some_and(|name| name.starts_with("latchkey-"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn base(directories: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let base = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(base.path()).unwrap();
        for name in directories {
            fs::create_dir_all(path.join(name)).unwrap();
        }
        (base, path)
    }

    #[test]
    fn everything_but_the_way_to_the_hidden_directory_is_around_it() {
        let (_base, base) = base(&["a/hidden/x", "a/other", "b"]);
        symlink(base.join("a/hidden"), base.join("link")).unwrap();
        let around = Around::of(&base.join("a/hidden"), &[], &[]).unwrap();
        for (name, allowed) in
            [("a", false), ("a/hidden", false), ("a/other", true), ("b", true), ("link", false)]
        {
            assert_eq!(around.all.contains(&base.join(name)), allowed, "{name}: {around:?}");
        }
        let all = &around.all;
        assert!(all.contains(&PathBuf::from("/usr")) && !all.contains(&PathBuf::from("/")));
        assert_eq!(around.read, Vec::<PathBuf>::new());
    }

    #[test]
    fn what_jobs_share_can_be_read_wherever_it_lies() {
        let (_base, base) = base(&["work/engines", "cache/x", "bin/sub", "real", "opt"]);
        fs::write(base.join("real/terraform"), "x").unwrap();
        fs::write(base.join("bin/other"), "x").unwrap();
        symlink(base.join("real"), base.join("opt/link")).unwrap();
        symlink("../opt/link/terraform", base.join("bin/terraform")).unwrap();
        let shared = ["work/engines", "cache", "bin/terraform", "later/hooks"];
        let shared = shared.map(|name| base.join(name));
        let around = Around::of(&base.join("work"), &shared, &[]).unwrap();
        for (name, all, read) in [
            ("work", false, false),
            ("work/engines", false, true),
            ("cache", false, true),
            ("cache/x", false, false),
            // Nobody replaces the link, or one behind it.
            ("bin", false, true),
            ("bin/other", true, false),
            ("bin/sub", true, false),
            ("bin/terraform", false, false),
            ("opt", false, true),
            ("real", false, true),
            ("real/terraform", false, true),
            ("later/hooks", false, true),
        ] {
            let path = base.join(name);
            let found = (around.all.contains(&path), around.read.contains(&path));
            assert_eq!(found, (all, read), "{name}: {around:?}");
        }
        // Listed, it would show what is hidden.
        assert!(!around.read.contains(&base));
    }

    #[test]
    fn what_the_hidden_directory_lies_in_cannot_be_shared() {
        let (_base, base) = base(&["tree/work"]);
        let around = Around::of(&base.join("tree/work"), &[base.join("tree")], &[]).unwrap();
        assert!(!around.read.iter().chain(&around.all).any(|path| *path == base.join("tree")));
    }
}

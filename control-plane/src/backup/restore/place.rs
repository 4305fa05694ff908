//! Where a restore works: within the data directory itself.
//!
//! A data directory may be a mount point, which can be neither replaced nor filled from the file
//! system beside it. So all is made in `DATA/.restoring`, and moved up when it is whole:
//!
//! 1. `.restoring` is made and locked. Nobody starts a control plane on what has one.
//! 2. When all is in it and synced, `.restored-in-part` is written: what is beside it from here
//!    on is ours, and may be thrown away by the next restore.
//! 3. The parts are moved up, `.restoring` is removed, `.restored-in-part` last.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::super::{AUTHORITY, BLOBS, LOGS, files};
use super::{RestoreError, failed};
use crate::durable;

const RESTORING: &str = ".restoring";
const IN_PART: &str = ".restored-in-part";
/// What a file system may have at its top by itself.
const LOST_AND_FOUND: &str = "lost+found";

pub(super) const STORE: &str = "store";
const PARTS: [&str; 4] = [STORE, BLOBS, LOGS, AUTHORITY];

/// Answers what a restore that did not come to its end left in a data directory.
pub(crate) fn refuse_in_part(data_dir: &Path) -> Option<PathBuf> {
    [RESTORING, IN_PART].map(|name| data_dir.join(name)).into_iter().find(|path| path.exists())
}

#[derive(Debug)]
pub(super) struct Place {
    data_dir: PathBuf,
    work: PathBuf,
    existed: bool,
    _locked: File,
}

impl Place {
    /// Step 1.
    pub(super) fn claim(data_dir: &Path) -> Result<Self, RestoreError> {
        let existed = data_dir.symlink_metadata().is_ok();
        if existed {
            check_empty(data_dir)?;
            let owner = durable::owner_if_another(data_dir).map_err(failed("read", data_dir))?;
            if let Some(owner) = owner {
                return Err(RestoreError::Owner { path: data_dir.to_path_buf(), owner });
            }
        }
        durable::create_private_directory(data_dir).map_err(failed("create", data_dir))?;
        let work = data_dir.join(RESTORING);
        let locked = files::claim(&work)
            .map_err(failed("prepare", &work))?
            .ok_or_else(|| RestoreError::UnderWay { path: data_dir.to_path_buf() })?;
        let place = Self { data_dir: data_dir.to_path_buf(), work, existed, _locked: locked };
        match place.clear() {
            Ok(()) => Ok(place),
            Err(source) => {
                place.give_up();
                Err(failed("clear", data_dir)(source))
            }
        }
    }

    pub(super) fn work(&self) -> &Path {
        &self.work
    }

    /// Throws away what a restore had moved up when it was killed.
    fn clear(&self) -> io::Result<()> {
        let mark = self.data_dir.join(IN_PART);
        if !mark.exists() {
            return Ok(());
        }
        for part in PARTS {
            remove(&self.data_dir.join(part))?;
        }
        durable::sync_directory(&self.data_dir)?;
        fs::remove_file(mark)?;
        durable::sync_directory(&self.data_dir)
    }

    /// Steps 2 and 3.
    pub(super) fn move_up(self) -> Result<(), RestoreError> {
        let moved = || {
            durable::sync_directory(&self.work)?;
            durable::replace(&self.data_dir.join(IN_PART), b"")?;
            for part in PARTS {
                fs::rename(self.work.join(part), self.data_dir.join(part))?;
            }
            durable::sync_directory(&self.data_dir)?;
            remove(&self.work)?;
            fs::remove_file(self.data_dir.join(IN_PART))?;
            durable::sync_directory(&self.data_dir)
        };
        moved().map_err(failed("move what was restored up in", &self.data_dir))
    }

    /// Leaves the data directory as it was found.
    pub(super) fn give_up(self) {
        // What cannot be removed is thrown away by the next restore.
        let _ = remove(&self.work);
        if !self.existed {
            let _ = fs::remove_dir(&self.data_dir);
        }
    }
}

fn check_empty(data_dir: &Path) -> Result<(), RestoreError> {
    let in_part = data_dir.join(IN_PART).exists();
    let is_ours = |name: &str| {
        name == RESTORING
            || name == LOST_AND_FOUND
            || name.starts_with(IN_PART)
            || (in_part && PARTS.contains(&name))
    };
    let mut entries = fs::read_dir(data_dir).map_err(failed("list", data_dir))?;
    let is_empty = entries
        .all(|entry| entry.is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_ours)));
    match is_empty {
        true => Ok(()),
        false => Err(RestoreError::NotEmpty { path: data_dir.to_path_buf() }),
    }
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(data_dir: &Path) -> Place {
        let place = Place::claim(data_dir).unwrap();
        for part in PARTS {
            fs::create_dir(place.work().join(part)).unwrap();
        }
        place
    }

    #[test]
    fn what_a_restore_left_that_was_killed_is_replaced_by_the_next() {
        let root = tempfile::tempdir().unwrap();
        let data = root.path().join("data");
        // Killed while it fills, and while it moves.
        drop(place(&data));
        assert!(refuse_in_part(&data).is_some());
        let killed = place(&data);
        fs::write(data.join(IN_PART), b"").unwrap();
        fs::rename(killed.work().join(STORE), data.join(STORE)).unwrap();
        drop(killed);
        assert!(refuse_in_part(&data).is_some());

        place(&data).move_up().unwrap();
        assert_eq!(refuse_in_part(&data), None);
        let full = Place::claim(&data).unwrap_err();
        assert!(matches!(full, RestoreError::NotEmpty { .. }), "{full}");
        assert!(data.join(STORE).exists());
    }

    #[test]
    fn two_restores_to_one_place_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let _first = place(root.path());
        let second = Place::claim(root.path()).unwrap_err();
        assert!(matches!(second, RestoreError::UnderWay { .. }), "{second}");
    }

    #[test]
    fn a_place_that_is_given_up_is_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let data = root.path().join("data");
        place(&data).give_up();
        assert!(!data.exists());
        fs::create_dir_all(data.join(LOST_AND_FOUND)).unwrap();
        place(&data).give_up();
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
    }
}

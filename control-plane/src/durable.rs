//! Files that are still there, whole, after a power loss.
//!
//! A file is durable once its bytes are synced and so is the directory that names it. The
//! store's marker, the master key, blobs and run logs all come into being through this file.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Creates a directory that only its owner may enter, with its parents, durably. One that
/// exists is narrowed to its owner.
pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    if make_private_directory(path)? { sync_parent(path) } else { Ok(()) }
}

/// Does the same, but for what makes it durable. Tells whether it is new.
pub(crate) fn make_private_directory(path: &Path) -> io::Result<bool> {
    let existed = path.is_dir();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    if existed {
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(!existed)
}

/// Returns the owner of a directory when it is somebody else than who runs this: what we would
/// make in it, its owner could not use.
pub(crate) fn owner_if_another(path: &Path) -> io::Result<Option<u32>> {
    let owner = fs::metadata(path)?.uid();
    Ok((owner != own_user()?).then_some(owner))
}

/// Returns the effective user of this process, who owns what /proc says of it.
pub(crate) fn own_user() -> io::Result<u32> {
    Ok(fs::metadata("/proc/self")?.uid())
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the name of a file or directory durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_directory(Path::new(".")),
        Some(parent) => sync_directory(parent),
        None => Ok(()),
    }
}

/// Writes a file under a temporary name and renames it, so that it is seen whole or not at all.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    // One that a kill left behind may have any mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_private_even_if_it_existed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        create_private_directory(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        create_private_directory(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_replaced_file_is_private_whatever_a_kill_left() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("key");
        let left = root.path().join("key.new");
        fs::write(&left, b"left by a kill").unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o644)).unwrap();
        replace(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!left.exists());
    }
}

//! Where some bytes are: for secrets that must be nowhere.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Finds the files under a directory that hold `needle`. Files that vanish meanwhile are passed
/// over.
pub fn files_with(directory: &Path, needle: &[u8]) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    look_into(directory, needle, &mut found)?;
    found.sort();
    Ok(found)
}

fn look_into(directory: &Path, needle: &[u8], found: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            look_into(&path, needle, found)?;
        } else if kind.is_file() {
            match fs::read(&path) {
                Ok(content) if holds(&content, needle) => found.push(path),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn holds(content: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return true };
    let starts = content.iter().enumerate().filter(|(_, byte)| *byte == first);
    starts.into_iter().any(|(at, _)| content[at..].starts_with(needle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found_in_files_below() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("deep")).unwrap();
        fs::write(directory.path().join("deep/a"), b"xx\0canary\xff").unwrap();
        fs::write(directory.path().join("b"), b"canar").unwrap();
        let found = files_with(directory.path(), b"canary").unwrap();
        assert_eq!(found, [directory.path().join("deep/a")]);
    }
}

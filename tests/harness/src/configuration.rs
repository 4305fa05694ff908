//! Terraform files, packed as the control plane takes them.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;

/// A gzipped tar.
#[derive(Debug, Clone)]
pub struct Configuration {
    packed: Vec<u8>,
}

impl Configuration {
    /// Packs files given by path and content.
    pub fn of(files: &[(&str, &str)]) -> Self {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, content) in files {
            append(&mut tar, Path::new(path), content.as_bytes())
                .expect("a short relative path and bytes in memory can be packed");
        }
        Self { packed: finish(tar).expect("memory takes what is written") }
    }

    /// Packs the files of a directory, without hidden ones. Links and the like are not followed.
    pub fn of_directory(directory: &Path) -> anyhow::Result<Self> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        add_directory(&mut tar, directory, Path::new(""))
            .with_context(|| format!("failed to pack {}", directory.display()))?;
        Ok(Self { packed: finish(tar)? })
    }

    /// Takes an archive as it is, such as one that must be refused.
    pub fn of_bytes(packed: Vec<u8>) -> Self {
        Self { packed }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.packed
    }
}

type Tar = tar::Builder<GzEncoder<Vec<u8>>>;

fn add_directory(tar: &mut Tar, directory: &Path, shown: &Path) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, shown) = (entry.path(), shown.join(entry.file_name()));
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            add_directory(tar, &path, &shown)?;
        } else if kind.is_file() {
            append(tar, &shown, &fs::read(&path)?)?;
        }
    }
    Ok(())
}

fn append(tar: &mut Tar, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, path, content)
}

fn finish(tar: Tar) -> io::Result<Vec<u8>> {
    let mut gzip = tar.into_inner()?;
    gzip.flush()?;
    gzip.finish()
}

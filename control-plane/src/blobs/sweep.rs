//! Walks through all blobs, a bounded step at a time, for whoever looks for what nobody needs.

use std::fs::{self, DirEntry, ReadDir};
use std::io;
use std::time::UNIX_EPOCH;

use latchkey_domain::id::{Digest, OrganizationId};

use super::{BlobError, Blobs, blocking};

/// Where a walk stands. It sees what was there when it came to a directory.
#[derive(Debug)]
pub struct Walk {
    organizations: ReadDir,
    current: Option<(OrganizationId, ReadDir)>,
}

impl Blobs {
    /// Goes on with a walk, or begins one. Passes up to `limit` files, and answers which of them
    /// are blobs that were written before `before` (milliseconds since the Unix epoch), and where
    /// the walk stands; nowhere once it is through.
    pub async fn walk(
        &self,
        walk: Option<Walk>,
        limit: usize,
        before: i64,
    ) -> Result<(Vec<(OrganizationId, Digest)>, Option<Walk>), BlobError> {
        let directory = self.shared.directory.clone();
        blocking("walk through the blobs", move || {
            let mut walk = match walk {
                Some(walk) => walk,
                None => Walk { organizations: fs::read_dir(directory)?, current: None },
            };
            let mut found = vec![];
            for _ in 0..limit {
                let Some((organization, entry)) = walk.next()? else { return Ok((found, None)) };
                let Some(digest) = entry.file_name().to_str().and_then(|name| name.parse().ok())
                else {
                    continue;
                };
                if is_older(&entry, before)? {
                    found.push((organization, digest));
                }
            }
            Ok((found, Some(walk)))
        })
        .await
    }
}

impl Walk {
    fn next(&mut self) -> io::Result<Option<(OrganizationId, DirEntry)>> {
        loop {
            if let Some((organization, entries)) = &mut self.current {
                if let Some(entry) = entries.next() {
                    return Ok(Some((*organization, entry?)));
                }
                self.current = None;
            }
            let Some(entry) = self.organizations.next() else { return Ok(None) };
            let entry = entry?;
            if let Some(organization) = organization_of(&entry) {
                self.current = Some((organization, fs::read_dir(entry.path())?));
            }
        }
    }
}

/// Reads whose blobs a directory has; the one of temporary files is nobody's.
fn organization_of(entry: &DirEntry) -> Option<OrganizationId> {
    let mut bytes = [0; 16];
    hex::decode_to_slice(entry.file_name().to_str()?, &mut bytes).ok()?;
    Some(OrganizationId::from_bytes(bytes))
}

fn is_older(entry: &DirEntry, before: i64) -> io::Result<bool> {
    let modified = match entry.metadata() {
        Ok(metadata) => metadata.modified()?,
        // Deleted since.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let age = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(i64::try_from(age.as_millis()).is_ok_and(|modified| modified < before))
}

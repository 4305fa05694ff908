use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest;
use latchkey_domain::id::{Digest, OrganizationId};

use super::{BlobError, Blobs};
use crate::seal::MasterKey;
use crate::seal::stream::SEGMENT;

fn organization(number: u8) -> OrganizationId {
    OrganizationId::from_bytes([number; 16])
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 % 251) as u8).collect()
}

fn sha256(bytes: &[u8]) -> Digest {
    let digest = digest::digest(&digest::SHA256, bytes);
    Digest::from_bytes(digest.as_ref().try_into().unwrap())
}

fn open(directory: &Path) -> Blobs {
    Blobs::open(directory, Arc::new(MasterKey::ephemeral())).unwrap()
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

async fn read(blobs: &Blobs, number: u8, digest: Digest) -> Result<Vec<u8>, BlobError> {
    let mut reader = blobs.read(organization(number), digest).await?;
    let mut whole = Vec::new();
    while let Some(chunk) = reader.next().await? {
        assert!(!chunk.is_empty() && chunk.len() <= SEGMENT);
        whole.extend(chunk);
    }
    assert_eq!(whole.len() as u64, reader.length());
    Ok(whole)
}

#[tokio::test]
async fn blobs_of_all_lengths_are_read_as_they_were_stored() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    for length in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 4 * SEGMENT, 5 * SEGMENT + 7] {
        let content = bytes(length);
        let expected = sha256(&content);
        let mut upload = blobs.begin(organization(1), Some(expected), length as u64).await.unwrap();
        for piece in content.chunks(10_007) {
            upload.write(piece).await.unwrap();
        }
        assert!(!blobs.exists(organization(1), expected).await.unwrap());
        assert_eq!(upload.finish().await.unwrap(), expected);
        assert_eq!(read(&blobs, 1, expected).await.unwrap(), content);
        let whole = blobs.get(organization(1), expected, length as u64).await.unwrap();
        assert_eq!(whole.expose_secret(), content);
    }
    assert_eq!(files(root.path()).len(), 7);
}

#[tokio::test]
async fn other_content_than_announced_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let announced = sha256(b"announced");
    let mut upload = blobs.begin(organization(1), Some(announced), 100).await.unwrap();
    upload.write(b"other").await.unwrap();
    match upload.finish().await {
        Err(BlobError::WrongDigest { expected, found }) => {
            assert_eq!((expected, found), (announced, sha256(b"other")));
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert_eq!(files(root.path()), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn content_over_the_limit_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let mut upload = blobs.begin(organization(1), None, 10).await.unwrap();
    upload.write(b"12345").await.unwrap();
    let error = upload.write(b"678901").await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { limit: 10 }));
    assert!(upload.write(b"").await.is_err());
    assert!(upload.finish().await.is_err());
    assert_eq!(files(root.path()), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn an_abandoned_upload_leaves_nothing_and_a_killed_one_is_swept() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let mut upload = blobs.begin(organization(1), None, 1 << 20).await.unwrap();
    upload.write(&bytes(3 * SEGMENT)).await.unwrap();
    assert_eq!(files(root.path()).len(), 1);
    drop(upload);
    assert_eq!(files(root.path()), [] as [PathBuf; 0]);

    fs::write(root.path().join("temporary/left"), b"torn").unwrap();
    open(root.path());
    assert_eq!(files(root.path()), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn a_tenants_blob_is_nobody_elses() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let digest = blobs.put(organization(1), b"mine").await.unwrap();
    assert!(!blobs.exists(organization(2), digest).await.unwrap());
    let error = read(&blobs, 2, digest).await.unwrap_err();
    assert!(matches!(error, BlobError::Missing { .. }));
    // Not even moved there by hand.
    let theirs = root.path().join(hex::encode([2; 16]));
    fs::create_dir(&theirs).unwrap();
    let mine = root.path().join(hex::encode([1; 16])).join(digest.to_string());
    fs::copy(mine, theirs.join(digest.to_string())).unwrap();
    let error = read(&blobs, 2, digest).await.unwrap_err();
    assert!(matches!(error, BlobError::Damaged { .. }));
}

#[tokio::test]
async fn a_blob_under_anothers_name_is_found_out_before_its_last_byte() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let one = blobs.put(organization(1), b"one").await.unwrap();
    let two = blobs.put(organization(1), b"two").await.unwrap();
    let directory = root.path().join(hex::encode([1; 16]));
    fs::copy(directory.join(one.to_string()), directory.join(two.to_string())).unwrap();
    assert!(matches!(read(&blobs, 1, two).await, Err(BlobError::Damaged { .. })));
    // Storing it again heals it.
    blobs.put(organization(1), b"two").await.unwrap();
    assert_eq!(read(&blobs, 1, two).await.unwrap(), b"two");
}

#[tokio::test]
async fn any_flipped_byte_and_any_cut_is_found() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let digest = blobs.put(organization(1), &bytes(2 * SEGMENT)).await.unwrap();
    let path = root.path().join(hex::encode([1; 16])).join(digest.to_string());
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(9_973).chain([0, 4, 5, 40, whole.len() - 1]) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&path, flipped).unwrap();
        let error = read(&blobs, 1, digest).await.unwrap_err();
        assert!(matches!(error, BlobError::Damaged { .. }), "byte {at}: {error}");
        fs::write(&path, &whole[..at]).unwrap();
        let error = read(&blobs, 1, digest).await.unwrap_err();
        assert!(matches!(error, BlobError::Damaged { .. }), "cut at {at}: {error}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert!(matches!(read(&blobs, 1, digest).await, Err(BlobError::Damaged { .. })));
}

#[tokio::test]
async fn no_plaintext_is_on_disk() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let content = b"canary-".repeat(30_000);
    let mut upload = blobs.begin(organization(1), None, 1 << 20).await.unwrap();
    upload.write(&content).await.unwrap();
    let holds_canary = || {
        files(root.path())
            .iter()
            .any(|path| fs::read(path).unwrap().windows(6).any(|window| window == b"canary"))
    };
    assert!(!holds_canary());
    upload.finish().await.unwrap();
    assert!(!holds_canary());
}

#[tokio::test]
async fn deleting_is_final_and_may_be_repeated() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let digest = blobs.put(organization(1), b"gone").await.unwrap();
    for _ in 0..2 {
        blobs.may_delete().unwrap().delete(organization(1), digest).await.unwrap();
        assert!(!blobs.exists(organization(1), digest).await.unwrap());
    }
    let error = blobs.get(organization(1), digest, 10).await.unwrap_err();
    assert!(matches!(error, BlobError::Missing { .. }));
}

#[tokio::test]
async fn a_blob_too_large_to_hold_is_not_gotten() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let digest = blobs.put(organization(1), &bytes(100)).await.unwrap();
    let error = blobs.get(organization(1), digest, 99).await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { limit: 99 }));
}

#[tokio::test]
async fn held_blobs_are_deleted_only_afterwards_and_nobody_waits() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let digest = blobs.put(organization(1), b"kept").await.unwrap();
    let held = blobs.hold().await;
    assert!(blobs.may_delete().is_none());
    drop(held);
    let deleting = blobs.may_delete().unwrap();
    let holding = tokio::spawn({
        let blobs = blobs.clone();
        async move { blobs.hold().await }
    });
    deleting.delete(organization(1), digest).await.unwrap();
    assert!(!holding.is_finished(), "a backup begins after the deletions under way");
    drop(deleting);
    drop(holding.await.unwrap());
    assert!(!blobs.exists(organization(1), digest).await.unwrap());
}

#[tokio::test]
async fn what_is_read_in_one_piece_of_work_is_whole_or_refused() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    for length in [0, SEGMENT, 3 * SEGMENT + 5] {
        let digest = blobs.put(organization(1), &bytes(length)).await.unwrap();
        let reader = blobs.read(organization(1), digest).await.unwrap();
        let read = reader.read_with(|reader| {
            let mut whole = vec![];
            reader.read_to_end(&mut whole).map(|_| whole)
        });
        assert_eq!(read.await.unwrap().unwrap(), bytes(length));
    }
    let digest = blobs.put(organization(1), &bytes(2 * SEGMENT)).await.unwrap();
    let path = root.path().join(hex::encode([1; 16])).join(digest.to_string());
    let mut flipped = fs::read(&path).unwrap();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&path, flipped).unwrap();
    let reader = blobs.read(organization(1), digest).await.unwrap();
    let error = reader.read_with(|reader| std::io::copy(reader, &mut std::io::sink()).is_ok());
    assert!(matches!(error.await, Err(BlobError::Damaged { .. })));
}

#[tokio::test]
async fn a_walk_passes_every_blob_once_in_bounded_steps() {
    let root = tempfile::tempdir().unwrap();
    let blobs = open(root.path());
    let mut stored = vec![];
    for number in 1..=3 {
        for length in 0..4 {
            let digest = blobs.put(organization(number), &bytes(length)).await.unwrap();
            stored.push((organization(number), digest));
        }
    }
    fs::write(root.path().join("temporary/upload"), b"on its way").unwrap();
    fs::write(root.path().join("stray"), b"no blob").unwrap();
    let (mut walk, mut found) = (None, vec![]);
    let late = i64::MAX;
    loop {
        let (some, next) = blobs.walk(walk, 5, late).await.unwrap();
        assert!(some.len() <= 5);
        found.extend(some);
        walk = next;
        if walk.is_none() {
            break;
        }
    }
    let key = |found: &(OrganizationId, Digest)| (*found.0.as_bytes(), *found.1.as_bytes());
    found.sort_by_key(key);
    stored.sort_by_key(key);
    assert_eq!(found, stored);
    // What is newer than asked for may be an upload that has just been named.
    assert!(blobs.walk(None, 100, 0).await.unwrap().0.is_empty());
}

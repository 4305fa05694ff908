use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use latchkey_domain::id::{Generation, OrganizationId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::time::Timestamp;

use super::{BackupError, Manifest, RestoreError, Source, restore, take};
use crate::auth::sha256;
use crate::authority::Authority;
use crate::blobs::Blobs;
use crate::clock::{Clock, Wall};
use crate::run_log::{self, RunLogs};
use crate::seal::{IfMissing, MasterKey};
use crate::store::record::encode;
use crate::store::sled::{Options, Sled};
use crate::store::{Batch, Expect, Key, Store, keys, list};

/// The data of a control plane, without its use cases.
struct Data {
    root: tempfile::TempDir,
    data: PathBuf,
    store: Arc<Sled>,
    blobs: Blobs,
    logs: RunLogs,
    master: Arc<MasterKey>,
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(Wall)
}

fn organization() -> OrganizationId {
    OrganizationId::from_bytes([1; 16])
}

fn run(number: u32) -> RunId {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    RunId::from_bytes(bytes)
}

fn record(number: u32) -> Key {
    keys::run(run(number))
}

impl Data {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let data = root.path().join("data");
        let master = MasterKey::open(&root.path().join("data.key"), IfMissing::Create).unwrap();
        Authority::open(&data.join("authority"), &master, clock()).unwrap();
        let store = Arc::new(Sled::open(&Options::new(data.join("store"))).unwrap());
        let generation = encode(&Generation::new(4).get());
        let batch = Batch::new().put(keys::generation(), Expect::Absent, generation);
        store.commit(batch).await.unwrap();
        let master = Arc::new(master);
        let blobs = Blobs::open(data.join("blobs"), Arc::clone(&master)).unwrap();
        let logs = RunLogs::open(run_log::Options::new(data.join("logs"))).unwrap();
        Self { root, data, store, blobs, logs, master }
    }

    fn key_file(&self) -> PathBuf {
        self.root.path().join("data.key")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    async fn take(&self, to: &Path) -> Result<Manifest, BackupError> {
        let source = Source {
            data_dir: &self.data,
            store: &*self.store,
            logs: &self.logs,
            blobs: Some(&self.blobs),
            master: &self.master,
        };
        take(source, to, Timestamp::from_millis(1_000)).await
    }

    async fn restore(&self, from: &str, to: &str) -> Result<super::Restored, RestoreError> {
        self.restore_with(from, to, &self.key_file()).await
    }

    async fn restore_with(
        &self,
        from: &str,
        to: &str,
        key_file: &Path,
    ) -> Result<super::Restored, RestoreError> {
        let (from, data_dir) = (&self.path(from), &self.path(to));
        restore(super::Plan { from, data_dir, key_file, above: None }, clock()).await
    }

    /// Lets 64 writers commit until the answer's flag is raised; they answer what was
    /// acknowledged, and the longest that one had to wait.
    fn load(&self, first: u32) -> Load {
        let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(first)));
        let writers = (0..64).map(|_| {
            let (store, stop, next) =
                (Arc::clone(&self.store), Arc::clone(&stop), Arc::clone(&next));
            tokio::spawn(async move {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::SeqCst) {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    let begun = Instant::now();
                    let new = Batch::new().put(record(number), Expect::Absent, vec![7; 500]);
                    // Something old changes too, wherever the backup may be.
                    let old = record(number.wrapping_mul(7919) % first.max(1));
                    store.commit(new.put(old, Expect::Anything, vec![8; 500])).await.unwrap();
                    longest = longest.max(begun.elapsed());
                }
                longest
            })
        });
        let writers = writers.collect();
        Load { stop, next, writers }
    }
}

struct Load {
    stop: Arc<AtomicBool>,
    next: Arc<AtomicU32>,
    writers: Vec<tokio::task::JoinHandle<Duration>>,
}

impl Load {
    async fn until(&self, number: u32) {
        while self.next.load(Ordering::SeqCst) < number {
            tokio::task::yield_now().await;
        }
    }

    async fn stop(self) -> Duration {
        self.stop.store(true, Ordering::SeqCst);
        let mut longest = Duration::ZERO;
        for writer in self.writers {
            longest = longest.max(writer.await.unwrap());
        }
        longest
    }
}

async fn fill(data: &Data, runs: u32) {
    for first in (0..runs).step_by(500) {
        let batch = (first..runs.min(first + 500)).fold(Batch::new(), |batch, number| {
            batch.put(record(number), Expect::Absent, vec![6; 2000])
        });
        data.store.commit(batch).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_holds_all_that_was_acknowledged_before() {
    let data = Data::new().await;
    fill(&data, 3000).await;
    let load = data.load(3000);
    load.until(3500).await;
    let before = data.store.newest().await.unwrap();
    let acknowledged = list(&*data.store, keys::all(keys::Kind::Run)).await.unwrap();
    let manifest = data.take(&data.path("backup")).await.unwrap();
    load.stop().await;
    assert!(manifest.version >= before.get());
    assert_eq!(manifest.generation, 4);

    let restored = data.restore("backup", "restored").await.unwrap();
    assert!(restored.generation.get() > 4);
    // Opened twice: the note of what was acknowledged must not be ahead of it, nor lost.
    drop(Sled::open(&Options::new(data.path("restored").join("store"))).unwrap());
    let store = Sled::open(&Options::new(data.path("restored").join("store"))).unwrap();
    assert_eq!(store.newest().await.unwrap().get(), manifest.version + 1);
    let note = fs::read(data.path("restored").join("store/acknowledged")).unwrap();
    assert_eq!(note[..8], store.newest().await.unwrap().get().to_be_bytes());
    let found = list(&store, keys::all(keys::Kind::Run)).await.unwrap();
    let found: std::collections::BTreeMap<_, _> = found.into_iter().collect();
    for (key, was) in &acknowledged {
        let is = found.get(key).unwrap_or_else(|| panic!("{key} is missing"));
        assert!(is.version >= was.version, "{key} is older than it was acknowledged");
        assert!(is.version.get() <= manifest.version, "{key} is newer than the backup");
    }
    // Each commit made one record and changed another: it is there whole or not at all.
    for (key, is) in found.iter().filter(|(_, is)| is.version > before) {
        let partners = found.values().filter(|other| other.version == is.version).count();
        assert!(partners <= 2, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_and_logs_come_back_as_they_were() {
    let data = Data::new().await;
    let digest = data.blobs.put(organization(), b"a state").await.unwrap();
    let log = b"{\"@message\":\"one\"}\n".to_vec();
    data.logs.append(run(1), Phase::Plan, 0, log.clone()).await.unwrap();
    data.logs.append(run(2), Phase::Apply, 0, log.clone()).await.unwrap();
    data.logs.finish(run(2), Phase::Apply).await.unwrap();
    let manifest = data.take(&data.path("backup")).await.unwrap();
    assert_eq!(manifest.files.count, 1 + 1 + 2 + 2);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&data.path("backup")), mode(&data.path("backup/records"))), (0o700, 0o600));
    // What comes later is not in it, not even through a link.
    data.logs.append(run(1), Phase::Plan, log.len() as u64, log.clone()).await.unwrap();
    data.blobs.may_delete().unwrap().delete(organization(), digest).await.unwrap();

    data.restore("backup", "restored").await.unwrap();
    let restored = data.path("restored");
    let master = Arc::new(MasterKey::open(&data.key_file(), IfMissing::Refuse).unwrap());
    let blobs = Blobs::open(restored.join("blobs"), master).unwrap();
    let found = blobs.get(organization(), digest, 100).await.unwrap();
    assert_eq!(found.expose_secret(), b"a state");
    let logs = RunLogs::open(run_log::Options::new(restored.join("logs"))).unwrap();
    assert_eq!(logs.read(run(1), Phase::Plan, 0, 1000).await.unwrap(), log);
    let finished = logs.progress(run(2), Phase::Apply).await.unwrap();
    assert_eq!((finished.length, finished.state), (log.len() as u64, run_log::State::Finished));
    // A restored file is no link: what happens to it doesn't touch the backup.
    let name = format!("blobs/{}/{digest}", hex::encode(organization().as_bytes()));
    let inode = |root: &str| fs::metadata(data.path(root).join(&name)).unwrap().ino();
    assert_ne!(inode("backup"), inode("restored"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_refused_and_nothing_is_left() {
    let data = Data::new().await;
    let digest = data.blobs.put(organization(), b"a state").await.unwrap();
    data.take(&data.path("backup")).await.unwrap();
    let blob = format!("blobs/{}/{digest}", hex::encode(organization().as_bytes()));
    for part in [
        "records",
        "files",
        "manifest.json",
        "manifest.sha256",
        "manifest.mac",
        "authority/ca.key",
        &blob,
    ] {
        let path = data.path("backup").join(part);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        // Not written into: it may be linked.
        fs::remove_file(&path).unwrap();
        for damaged in [Some(flipped), None] {
            if let Some(damaged) = damaged {
                fs::write(&path, damaged).unwrap();
            }
            let error = data.restore("backup", "restored").await.unwrap_err();
            let is_told = match &error {
                RestoreError::Damaged { .. } => true,
                RestoreError::Foreign { .. } => part == "manifest.mac",
                error => panic!("{part}: {error}"),
            };
            assert!(is_told, "{part}: {error}");
            let told = error.to_string();
            assert!(told.contains("use another"), "{part}: {told}");
            assert!(!data.path("restored").exists());
            let _ = fs::remove_file(&path);
        }
        fs::write(&path, whole).unwrap();
    }
    data.restore("backup", "restored").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_safe_is_refused() {
    let data = Data::new().await;
    let taken = data.take(&data.path("backup")).await.unwrap();
    assert_eq!(Manifest::read(&data.path("backup"), &data.master).unwrap(), taken);
    let exists = data.take(&data.path("backup")).await.unwrap_err();
    assert!(matches!(exists, BackupError::Exists { .. }));
    let within = data.take(&data.data.join("backup")).await.unwrap_err();
    assert!(matches!(within, BackupError::WithinData { .. }));
    let full = data.restore("backup", "data").await.unwrap_err();
    assert!(matches!(full, RestoreError::NotEmpty { .. }));

    let other = data.path("other.key");
    drop(MasterKey::open(&other, IfMissing::Create).unwrap());
    let error = data.restore_with("backup", "restored", &other).await.unwrap_err();
    assert!(matches!(error, RestoreError::Foreign { .. }), "{error}");
    let none = data.restore_with("backup", "restored", &data.path("none")).await.unwrap_err();
    assert!(matches!(none, RestoreError::Key(_)), "{none}");
    assert!(!data.path("restored").exists());
    // What a killed restore left is in nobody's way.
    data.restore("backup", "restored").await.unwrap();
}

/// As whoever may write to where backups are kept could, with all digests put right again.
fn forge(backup: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut records = fs::read(backup.join("records")).unwrap();
    change(&mut records);
    fs::write(backup.join("records"), &records).unwrap();
    let manifest = backup.join("manifest.json");
    let mut text: serde_json::Value =
        serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    text["records"]["sha256"] = sha256(&records).to_string().into();
    text["records"]["bytes"] = records.len().into();
    text["records"]["count"] = (text["records"]["count"].as_u64().unwrap() + 1).into();
    let text = serde_json::to_vec(&text).unwrap();
    fs::write(&manifest, &text).unwrap();
    fs::write(backup.join("manifest.sha256"), sha256(&text).to_string()).unwrap();
}

/// A record of its own.
fn put(records: &mut Vec<u8>, key: &[u8]) {
    records.extend(u16::try_from(key.len()).unwrap().to_be_bytes());
    records.extend(key);
    records.extend([1_u64.to_be_bytes().as_slice(), &4_u32.to_be_bytes(), b"true"].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_somebody_without_the_master_key_changed_is_refused() {
    let data = Data::new().await;
    data.take(&data.path("backup")).await.unwrap();
    forge(&data.path("backup"), |records| put(records, record(7).as_bytes()));
    let error = data.restore("backup", "restored").await.unwrap_err();
    assert!(matches!(error, RestoreError::Foreign { .. }), "{error}");
    assert!(!data.path("restored").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_record_may_have_a_key_of_the_databases_own() {
    for key in [b"\0last".as_slice(), b"\0", b""] {
        let data = Data::new().await;
        data.take(&data.path("backup")).await.unwrap();
        forge(&data.path("backup"), |records| put(records, key));
        // Even from somebody with the master key.
        let text = fs::read(data.path("backup/manifest.json")).unwrap();
        let mac = hex::encode(data.master.digest(b"backup manifest", &text));
        fs::write(data.path("backup/manifest.mac"), mac).unwrap();
        let error = data.restore("backup", "restored").await.unwrap_err();
        assert!(matches!(error, RestoreError::Load(_)), "{key:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_that_is_a_mount_point_is_filled_and_not_replaced() {
    let data = Data::new().await;
    data.take(&data.path("backup")).await.unwrap();
    let restored = data.path("restored");
    // What a file system has at its top.
    fs::create_dir_all(restored.join("lost+found")).unwrap();
    let before = fs::metadata(&restored).unwrap().ino();
    data.restore("backup", "restored").await.unwrap();
    assert_eq!(fs::metadata(&restored).unwrap().ino(), before);
    let mut names: Vec<_> =
        fs::read_dir(&restored).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["authority", "blobs", "logs", "lost+found", "store"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_restored_into_what_belongs_to_another_user() {
    let data = Data::new().await;
    data.take(&data.path("backup")).await.unwrap();
    let restored = data.path("restored");
    fs::create_dir(&restored).unwrap();
    // Only root can give a directory away.
    if std::os::unix::fs::chown(&restored, Some(4242), None).is_err() {
        return;
    }
    let error = data.restore("backup", "restored").await.unwrap_err();
    assert!(matches!(error, RestoreError::Owner { owner: 4242, .. }), "{error}");
    assert_eq!(fs::read_dir(&restored).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_not_lead_out_of_the_data_directory() {
    let within = |path: &str| {
        let entry = super::files::Entry { path: path.into(), bytes: 0, sha256: String::new() };
        entry.is_within(&["blobs", "logs", "authority"])
    };
    assert!(within("blobs/a/b") && within("authority/ca.key"));
    for path in ["blobs", "../x", "/etc/passwd", "blobs/../../x", "store/lock", "", "logs/./../x"] {
        assert!(!within(path), "{path}");
    }
}

/// Run by hand: `cargo test --release -- --ignored --nocapture commits_are_held`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures"]
async fn commits_are_held_by_a_backup_of_twenty_thousand_runs() {
    let data = Data::new().await;
    fill(&data, 20_000).await;
    let quiet = data.load(20_000);
    quiet.until(40_000).await;
    let quiet = quiet.stop().await;
    let load = data.load(60_000);
    load.until(61_000).await;
    let begun = Instant::now();
    let manifest = data.take(&data.path("backup")).await.unwrap();
    let took = begun.elapsed();
    let longest = load.stop().await;
    writeln!(
        std::io::stderr(),
        "{} records, {} MB in {took:?}; longest commit without a backup {quiet:?}, during one \
         {longest:?}",
        manifest.records.count,
        manifest.records.bytes >> 20,
    )
    .unwrap();
}

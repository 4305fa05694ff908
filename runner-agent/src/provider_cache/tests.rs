//! With a real engine, and a provider that nobody has to download: a mirror that the test makes.

use std::process::{Command, Output};
use std::thread;

use rustix::fs::{FlockOperation, flock};

use super::*;
use crate::engine::archive_of_tests;
use crate::engine::tests::at_hand_engine;

const SOURCE: &str = "mirror.test/latchkey/fake";

pub(crate) const CONFIGURATION: &str = r#"
terraform {
  required_providers {
    fake = {
      source  = "mirror.test/latchkey/fake"
      version = "1.2.3"
    }
  }
}
"#;

/// A mirror with one provider, and the operator's CLI configuration that names it.
pub(crate) struct Host {
    directory: tempfile::TempDir,
    engine: PathBuf,
    limit: u64,
}

impl Host {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let packages = directory.path().join("mirror").join(SOURCE);
        fs::create_dir_all(&packages).unwrap();
        let noise: Vec<u8> = (0..200_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let files: &[(&str, &[u8])] =
            &[("terraform-provider-fake_v1.2.3", &noise), ("docs/README.md", b"a fake")];
        let name = format!("terraform-provider-fake_1.2.3_{}.zip", target());
        fs::write(packages.join(name), archive_of_tests(files)).unwrap();
        let host = Self { directory, engine: at_hand_engine().path, limit: 0 };
        host.write_cli_config();
        host
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Whoever fetches the provider from now on fails.
    pub(crate) fn damage_the_mirror(&self) {
        let archive = format!("terraform-provider-fake_1.2.3_{}.zip", target());
        fs::write(self.at("mirror").join(SOURCE).join(archive), "damaged").unwrap();
    }

    fn write_cli_config(&self) {
        let text = format!(
            "provider_installation {{\n  filesystem_mirror {{\n    path = {:?}\n  }}\n}}\n",
            self.at("mirror")
        );
        fs::write(self.at("cli.tfrc"), text).unwrap();
    }

    /// A configuration, with a lock file where one is given.
    fn job(&self, name: &str, lock_file: Option<&[u8]>) -> PathBuf {
        let job = self.at(name);
        fs::create_dir_all(job.join("work")).unwrap();
        fs::write(job.join("work/main.tf"), CONFIGURATION).unwrap();
        if let Some(text) = lock_file {
            fs::write(job.join("work/.terraform.lock.hcl"), text).unwrap();
        }
        job
    }

    fn loan(&self, job: &Path) -> Loan {
        let lock_file = job.join("work/.terraform.lock.hcl");
        Loan::new(self.at("cache"), job.join("plugins"), lock_file, self.limit)
    }

    fn terraform(&self, job: &Path, arguments: &[&str]) -> Output {
        Command::new(&self.engine)
            .args(arguments)
            .current_dir(job.join("work"))
            .env_clear()
            .envs([
                ("CHECKPOINT_DISABLE", "1"),
                ("TF_IN_AUTOMATION", "1"),
                ("HOME", "/nonexistent"),
            ])
            .env("TF_CLI_CONFIG_FILE", self.at("cli.tfrc"))
            .env("TF_PLUGIN_CACHE_DIR", job.join("plugins"))
            .output()
            .unwrap()
    }

    /// `init` as a job does it: answers how many packages were lent, and kept.
    #[track_caller]
    fn init(&self, job: &Path, more: &[&str]) -> (usize, usize) {
        let loan = self.loan(job);
        let lent = loan.lend().unwrap();
        let arguments = [&["init", "-input=false", "-no-color"], more].concat();
        let output = self.terraform(job, &arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (lent, loan.take_in().unwrap())
    }

    /// The provider's digest, as the job would run it.
    fn provider(&self, job: &Path) -> String {
        let below = job.join("work/.terraform/providers").join(SOURCE).join("1.2.3").join(target());
        digest::of_file(&below.join("terraform-provider-fake_v1.2.3")).unwrap()
    }

    fn packages(&self) -> Vec<String> {
        let all = fs::read_dir(self.at("cache").join(target())).into_iter().flatten().flatten();
        let names = all.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name != ".lock" && !name.starts_with(".job-")).collect()
    }
}

fn lock_file_of(job: &Path) -> Vec<u8> {
    fs::read(job.join("work/.terraform.lock.hcl")).unwrap()
}

#[test]
fn sixteen_inits_at_once_all_get_whole_providers() {
    let host = Host::new();
    // First without lock files, all of them new; then with what those wrote, all of them lent.
    let mut lock_file = None;
    for (round, expect_lent) in [("first", 0), ("second", 1)] {
        let all: Vec<_> = thread::scope(|scope| {
            let jobs: Vec<_> = (0..16)
                .map(|n| {
                    let (host, lock_file) = (&host, &lock_file);
                    scope.spawn(move || {
                        let job = host.job(&format!("{round}-{n}"), lock_file.as_deref());
                        let (lent, _) = host.init(&job, &[]);
                        assert_eq!(lent, expect_lent);
                        (host.provider(&job), lock_file_of(&job))
                    })
                })
                .collect();
            jobs.into_iter().map(|job| job.join().unwrap()).collect()
        });
        assert!(all.iter().all(|one| *one == all[0]), "{round}");
        lock_file = Some(all[0].1.clone());
        assert_eq!(host.packages().len(), 1, "{:?}", host.packages());
    }
}

/// Each wants all room for itself: whatever can go, goes, while others begin and end.
#[test]
fn inits_at_once_keep_their_providers_while_room_is_made() {
    let host = Host { limit: 1, ..Host::new() };
    let first = host.job("first", None);
    host.init(&first, &[]);
    let (expect, lock_file) = (host.provider(&first), lock_file_of(&first));
    fs::remove_dir_all(&first).unwrap();
    thread::scope(|scope| {
        for n in 0..8 {
            let (host, expect, lock_file) = (&host, &expect, &lock_file);
            scope.spawn(move || {
                for round in 0..3 {
                    let job = host.job(&format!("job-{n}-{round}"), Some(lock_file));
                    host.init(&job, &["-lockfile=readonly"]);
                    assert_eq!(host.provider(&job), *expect);
                    // Somebody else's end makes room now.
                    bound::shrink(&host.at("cache").join(target()), host.limit).unwrap();
                    assert_eq!(host.provider(&job), *expect, "it is gone");
                    fs::remove_dir_all(&job).unwrap();
                }
            });
        }
    });
    bound::shrink(&host.at("cache").join(target()), host.limit).unwrap();
    assert!(host.packages().is_empty(), "{:?}", host.packages());
}

#[test]
fn a_kept_package_is_not_fetched_again() {
    let host = Host::new();
    let first = host.job("first", None);
    assert_eq!(host.init(&first, &[]), (0, 1));
    host.damage_the_mirror();
    // As the apply does it.
    let second = host.job("second", Some(&lock_file_of(&first)));
    assert_eq!(host.init(&second, &["-lockfile=readonly"]), (1, 0));
    assert_eq!(host.provider(&second), host.provider(&first));
    assert_eq!(lock_file_of(&second), lock_file_of(&first));
    // A second `init` of the same job, too.
    assert_eq!(host.init(&second, &["-lockfile=readonly"]), (0, 0));
}

#[test]
fn a_lock_file_without_the_hash_is_not_broken_and_nothing_is_written_over() {
    let host = Host::new();
    let first = host.job("first", None);
    host.init(&first, &[]);
    let kept = host.at("cache").join(target()).join(&host.packages()[0]).join("package");
    let before = look(&kept, &files(&kept).unwrap()).unwrap();
    // As a workstation of another kind writes it: with a hash of the archive only.
    let archive = host.at("mirror").join(SOURCE);
    let archive = archive.join(format!("terraform-provider-fake_1.2.3_{}.zip", target()));
    let archive = digest::of_file(&archive).unwrap();
    let text = format!(
        "provider \"{SOURCE}\" {{\n  version = \"1.2.3\"\n  constraints = \"1.2.3\"\n  hashes = \
         [\n    \"h1:{}\",\n    \"zh:{archive}\",\n  ]\n}}\n",
        STANDARD.encode([7; 32])
    );
    let second = host.job("second", Some(text.as_bytes()));
    assert_eq!(host.init(&second, &[]).0, 0);
    assert_eq!(host.provider(&second), host.provider(&first));
    // And without any lock file, while others may be running it.
    let third = host.job("third", None);
    assert_eq!(host.init(&third, &[]).0, 0);
    assert_eq!(look(&kept, &files(&kept).unwrap()).unwrap(), before);
    assert_eq!(host.packages().len(), 1);
}

#[test]
fn a_damaged_package_is_not_lent() {
    let host = Host::new();
    let first = host.job("first", None);
    host.init(&first, &[]);
    let hash = host.packages().remove(0);
    let program = host.at("cache").join(target()).join(&hash).join("package");
    let program = program.join("terraform-provider-fake_v1.2.3");
    let good = fs::read(&program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    // Touched, but the same: as after a restore from a backup.
    fs::write(&program, &good).unwrap();
    let second = host.job("second", Some(&lock_file_of(&first)));
    assert_eq!(host.init(&second, &[]), (1, 0));
    let mut bad = good;
    bad[1000] ^= 1;
    fs::write(&program, bad).unwrap();
    let third = host.job("third", Some(&lock_file_of(&first)));
    assert_eq!(host.init(&third, &[]), (0, 1));
    assert_eq!(host.packages(), [hash]);
    assert_eq!(host.provider(&third), host.provider(&host.job("second", None)));
}

#[test]
fn what_a_killed_process_left_unfinished_is_removed_in_time() {
    let host = Host::new();
    let shared = host.at("cache").join(target());
    for (name, days) in [(".new-old", 2), (".gone-old", 2), (".new-now", 0)] {
        fs::create_dir_all(shared.join(name).join("package")).unwrap();
        let draft = File::open(shared.join(name)).unwrap();
        let changed = draft.metadata().unwrap().modified().unwrap();
        draft.set_modified(changed - std::time::Duration::from_secs(days * 86_400)).unwrap();
    }
    host.loan(&host.job("first", None)).lend().unwrap();
    assert_eq!(host.packages(), [".new-now"]);
}

#[test]
fn records_of_jobs_that_are_gone_go_in_a_cache_without_a_limit_too() {
    let host = Host { limit: 0, ..Host::new() };
    let first = host.job("first", None);
    host.init(&first, &[]);
    let lock_file = lock_file_of(&first);
    fs::remove_dir_all(&first).unwrap();
    for name in ["second", "third"] {
        let job = host.job(name, Some(&lock_file));
        host.init(&job, &["-lockfile=readonly"]);
        let shared = fs::read_dir(host.at("cache").join(target())).unwrap().flatten();
        let names = shared.map(|entry| entry.file_name().into_string().unwrap());
        let records: Vec<_> = names.filter(|name| name.starts_with(".job-")).collect();
        assert_eq!(records.len(), 1, "{name}: {records:?}");
        assert_eq!(host.packages().len(), 1);
        fs::remove_dir_all(&job).unwrap();
    }
}

/// As a job could: it may read the cache, and a lock wants no more.
pub(crate) fn taken(cache: &Path) -> File {
    let shared = cache.join(target());
    make(&shared).unwrap();
    let path = shared.join(".lock");
    File::options().append(true).create(true).open(&path).unwrap();
    let lock = File::open(path).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    lock
}

#[test]
fn a_cache_whose_lock_is_kept_gives_and_takes_nothing() {
    let host = Host::new();
    let first = host.job("first", None);
    host.init(&first, &[]);
    let taken = taken(&host.at("cache"));
    let second = host.job("second", Some(&lock_file_of(&first)));
    // A link without a record would lead nowhere once room is made.
    let error = host.loan(&second).lend().unwrap_err();
    assert!(error.to_string().starts_with("wait for the lock"), "{error}");
    assert!(!second.join("plugins").join(SOURCE).exists());
    host.loan(&first).take_in().unwrap_err();
    drop(taken);
    assert_eq!(host.init(&second, &["-lockfile=readonly"]), (1, 0));
}

#[test]
fn what_the_lock_file_does_not_name_is_not_kept() {
    let host = Host::new();
    let job = host.job("first", None);
    let loan = host.loan(&job);
    loan.lend().unwrap();
    let arguments = ["init", "-input=false", "-no-color"];
    assert!(host.terraform(&job, &arguments).status.success());
    // The job's own programs may write where its private cache is.
    let private = job.join("plugins").join(SOURCE).join("1.2.3").join(target());
    let program = private.join("terraform-provider-fake_v1.2.3");
    fs::write(&program, "forged").unwrap();
    assert_eq!(loan.take_in().unwrap(), 0);
    assert!(host.packages().is_empty(), "{:?}", host.packages());
    assert_eq!(fs::read(&program).unwrap(), b"forged");
}

#[test]
fn lock_files_that_would_lead_elsewhere_are_not_followed() {
    let block = |source: &str, version: &str| {
        format!("provider \"{source}\" {{\n version = \"{version}\"\n hashes = [\"h1:x\", 7]\n}}\n")
    };
    assert_eq!(
        locked(&block("a.test/b/c", "1.0.0")),
        [Locked { path: "a.test/b/c/1.0.0".into(), hashes: vec![] }]
    );
    for (source, version) in [
        ("a.test/b/..", "1.0.0"),
        ("../../c", "1.0.0"),
        ("/a/b", "1.0.0"),
        ("a/b", "c/1.0.0"),
        ("a/b/c", "../x"),
        ("a/b/c", ".."),
        ("a/b/c/d", "1"),
    ] {
        assert_eq!(locked(&block(source, version)), [], "{source} {version}");
    }
    assert_eq!(locked("no { lock file"), []);
}

//! The job directory: the truth on the build host.
//!
//! Everything the agent or the supervisor tells is written and synced here first, so either can
//! be killed at any moment and its successor reads where things stand:
//!
//! ```text
//! lease.json, spec.json, settings.json   accepted: written before the directory has its name
//! starting                               about to ask for `Go`
//! exec                                   the point of no return: terraform may have run
//! endpoints.json, state-lock             how terraform reaches its supervisor: for a successor
//! process, interrupted                   pid and start time of the running terraform; whether it
//!                                        was asked to stop
//! forced                                 canceled by force: no more credentials
//! raw, log, checkpoint                   what terraform wrote; the canonical log; their relation
//! state/base, state/NNNN                 the state at the lease; every state written since
//! work/                                  the configuration, or the restored workspace
//! plan.bin, changes.json, workspace.tar.gz   what a plan makes
//! errored.tfstate, state-dump.tfstate    what terraform could not deliver; what it printed then
//! untaken                                in place of the former, when it cannot be brought
//! outcome.json                           how terraform's apply ended: the result to be
//! result.json                            how it ended; written last
//! shipped/…                              hints: how much was acknowledged (repeats are harmless)
//! shipped.json                           all of it was: what is left is to say so
//! full                                   while the host's spool is full: the log takes no more
//! ```
//!
//! A record is written to a temporary file, synced, renamed, and the directory synced.

mod removal;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::removal::{is_named, remove_tree};
use crate::engine;
use crate::job::{JobResult, Lease, Spec};
use crate::random;
use crate::supervisor::confine::Confinement;
use crate::supervisor::hooks::Hooks;

/// What terraform could not deliver, as it saved it.
pub(crate) const ERRORED_STATE: &str = "errored.tfstate";

/// The state that terraform printed because it could write it nowhere; the supervisor cuts it
/// from the log.
pub(crate) const STATE_DUMP: &str = "state-dump.tfstate";

/// What terraform may have saved as the only copy of a state, and cannot be read or is too large:
/// it is never brought, and never removed.
pub(crate) const UNTAKEN: &str = "untaken";

/// What the shipper notes when all was acknowledged.
pub(crate) const SHIPPED: &str = "shipped.json";

/// Go's plugin sockets live in TMPDIR, and a socket's path may have 107 bytes.
const LONGEST_TMPDIR: usize = 80;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{what} {path}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("understand {path}")]
    Record {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// How far a job has come, by what is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Accepted; nothing was asked for yet.
    Accepted,
    /// `Starting` may have been sent; terraform provably did not run.
    Starting,
    /// Terraform may have run.
    Executed,
    /// The result is known.
    Ended,
}

/// What the agent's configuration contributes to a job. Names of variables, never values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    #[serde(default)]
    pub(crate) engine: engine::Name,
    /// The engine's program.
    pub(crate) terraform: PathBuf,
    pub(crate) terraform_version: String,
    /// Where provider packages are kept from one `init` to the next.
    #[serde(default)]
    pub(crate) provider_cache: Option<PathBuf>,
    /// In bytes: how much it may take; 0 for no bound.
    #[serde(default)]
    pub(crate) provider_cache_limit: u64,
    pub(crate) pass_env: Vec<String>,
    pub(crate) terraform_cli_config: Option<PathBuf>,
    /// In bytes: how much of terraform's output the log takes.
    #[serde(default = "longest_log")]
    pub(crate) longest_log: u64,
    /// In bytes: how much the jobs of the host may keep until it is sent.
    #[serde(default = "unbounded")]
    pub(crate) spool_limit: u64,
    /// In bytes: how much of the disk the log leaves free.
    #[serde(default)]
    pub(crate) low_water: u64,
    #[serde(default)]
    pub(crate) confinement: Confinement,
    #[serde(default)]
    pub(crate) hooks: Hooks,
}

/// What a control plane takes.
pub(crate) fn longest_log() -> u64 {
    256 << 20
}

/// For jobs that an agent took which did not know of the limit.
fn unbounded() -> u64 {
    u64::MAX
}

#[derive(Debug, Clone)]
pub(crate) struct JobDirectory {
    path: PathBuf,
}

impl JobDirectory {
    /// Makes the directory whole or not at all.
    pub(crate) fn create(
        jobs: &Path,
        lease: &Lease,
        spec: &Spec,
        settings: &Settings,
    ) -> Result<Self, Error> {
        let path = jobs.join(lease.directory_name());
        let draft = Self { path: jobs.join(format!(".new-{}", lease.directory_name())) };
        remove_tree(&draft.path)?;
        let fill = || {
            for sub in ["", "state", "work", "home", "shipped"] {
                private_directory(&draft.path.join(sub))?;
            }
            draft.write_synced("lease.json", &encode(lease))?;
            draft.write_synced("spec.json", &encode(spec))?;
            draft.write_synced("settings.json", &encode(settings))?;
            sync_directory(&draft.path)?;
            fs::rename(&draft.path, &path).map_err(io_error("name", &path))
        };
        if let Err(error) = fill() {
            // On a full disk, of all places. The first failure is the one to tell.
            let _ = remove_tree(&draft.path);
            return Err(error);
        }
        sync_directory(jobs)?;
        let directory = Self { path };
        if let Err(error) = directory.make_tmpdir() {
            // The first failure is the one to tell.
            let _ = directory.wipe();
            return Err(error);
        }
        Ok(directory)
    }

    pub(crate) fn open(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Lists the directories of jobs, and removes drafts and half-removed ones.
    pub(crate) fn list(jobs: &Path) -> Result<Vec<Self>, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir(jobs).map_err(io_error("list", jobs))? {
            let path = entry.map_err(io_error("list", jobs))?.path();
            let is_job = path.join("lease.json").exists();
            if is_named(&path, b".") || (path.is_dir() && !is_job) {
                // One that stays is in nobody's way; a runner that does not start is.
                Self { path }.clear_or_warn();
            } else if is_job {
                found.push(Self { path });
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn lease(&self) -> Result<Lease, Error> {
        self.read("lease.json")
    }

    pub(crate) fn spec(&self) -> Result<Spec, Error> {
        self.read("spec.json")
    }

    pub(crate) fn settings(&self) -> Result<Settings, Error> {
        self.read("settings.json")
    }

    pub(crate) fn result(&self) -> Result<JobResult, Error> {
        self.read("result.json")
    }

    /// Answers the directory terraform runs in.
    pub(crate) fn root(&self, spec: &Spec) -> PathBuf {
        self.join("work").join(&spec.working_directory)
    }

    pub(crate) fn stage(&self) -> Stage {
        let has = |name: &str| self.join(name).exists();
        match () {
            () if has("result.json") => Stage::Ended,
            () if has("exec") => Stage::Executed,
            () if has("starting") => Stage::Starting,
            () => Stage::Accepted,
        }
    }

    /// Writes a record that survives power loss once this returns.
    pub(crate) fn record<T: Serialize>(&self, name: &str, value: &T) -> Result<(), Error> {
        self.record_bytes(name, &encode(value))
    }

    pub(crate) fn record_bytes(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        replace(&self.path, name, bytes)
    }

    /// Writes a record, whole or not at all, that need not survive power loss.
    pub(crate) fn note(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let draft = self.join(&format!("{name}.new"));
        create_private(&draft)
            .and_then(|mut file| file.write_all(bytes))
            .map_err(io_error("write", &draft))?;
        let to = self.join(name);
        fs::rename(&draft, &to).map_err(io_error("name", &to))
    }

    pub(crate) fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let path = self.join(name);
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Record { path, source })
    }

    /// Answers the numbers of the states terraform wrote, in order.
    pub(crate) fn states(&self) -> Result<Vec<u64>, Error> {
        let path = self.join("state");
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).map_err(io_error("list", &path))? {
            let name = entry.map_err(io_error("list", &path))?.file_name();
            // `base` and temporary files are no numbers.
            found.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        found.sort_unstable();
        Ok(found)
    }

    pub(crate) fn state_name(sequence: u64) -> String {
        format!("state/{sequence:04}")
    }

    /// Reads a hint about what was acknowledged; 0 when there is none.
    pub(crate) fn shipped(&self, what: &str) -> u64 {
        fs::read_to_string(self.join("shipped").join(what))
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    }

    /// Writes a hint. Not synced: an old hint only repeats what is acknowledged again.
    pub(crate) fn set_shipped(&self, what: &str, value: u64) {
        let path = self.join("shipped").join(what);
        if let Err(error) = fs::write(&path, value.to_string()) {
            tracing::warn!(%error, path = %path.display(), "failed to note what was shipped");
        }
    }

    /// Answers what the shipper has noted when all was acknowledged.
    pub(crate) fn shipped_whole<T: DeserializeOwned>(&self) -> Option<T> {
        self.read(SHIPPED).ok()
    }

    /// Answers the private directory for temporary files.
    pub(crate) fn tmpdir(&self) -> PathBuf {
        // Terraform's programs could write the record, and the directory it names is removed.
        let ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            path.parent() == Some(Path::new("/tmp"))
                && name.is_some_and(|name| name.starts_with("latchkey-"))
        };
        let recorded = fs::read_to_string(self.join("tmpdir")).ok().map(PathBuf::from);
        recorded.filter(ours).unwrap_or_else(|| self.join("tmp"))
    }

    /// Takes the lock that every supervisor holds for its life. Having it proves that none lives
    /// and keeps another from starting; `None` while one may live.
    pub(crate) fn claim(&self) -> Result<Option<File>, Error> {
        let path = self.join("supervisor.lock");
        let lock = create_private(&path).map_err(io_error("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// Makes the names in the directory durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        sync_directory(&self.path)
    }

    fn make_tmpdir(&self) -> Result<(), Error> {
        let path = self.join("tmp");
        if path.as_os_str().len() <= LONGEST_TMPDIR {
            return private_directory(&path);
        }
        let short = PathBuf::from(format!("/tmp/latchkey-{}", &random::token()[..12]));
        // Its name is known before it exists, so that it is never left behind.
        self.record_bytes("tmpdir", short.as_os_str().as_encoded_bytes())?;
        DirBuilder::new().mode(0o700).create(&short).map_err(io_error("make", &short))
    }

    fn write_synced(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        write_synced(&self.join(name), bytes)
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || {
        latchkey_failpoint::check("run.disk")?;
        let mut file = create_private(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(io_error("write", path))
}

/// Puts a file in place of an older one, whole or not at all; it survives power loss once this
/// returns.
pub(crate) fn replace(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let (draft, to) = (directory.join(format!("{name}.new")), directory.join(name));
    write_synced(&draft, bytes)?;
    fs::rename(&draft, &to).map_err(io_error("name", &to))?;
    sync_directory(to.parent().unwrap_or(directory))
}

/// Opens a new or emptied file that only this user can read.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

pub(crate) fn private_directory(path: &Path) -> Result<(), Error> {
    DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(io_error("make", path))
}

pub(crate) fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io_error("sync", path))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("our records have string keys and no failing serializers")
}

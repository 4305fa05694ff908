//! What comes before `Starting`: fetch, unpack, check.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use latchkey_proto::v1::ArtifactKind;
use rustix::io::Errno;

use crate::engine::{Engines, InstallError};
use crate::job::{Digests, Failure, Lease, Phase, Spec};
use crate::job_directory::{self, JobDirectory, Settings, private_directory};
use crate::ship::{self, Shipper};
use crate::{digest, extract, root_module, untrusted};

/// What came of fetching.
pub(super) enum Fetched {
    /// The archive is in the job's directory; its digest.
    Archive(String),
    Ended(Prepared),
}

/// How preparing ended.
pub(super) enum Prepared {
    Ready,
    /// The job ends here, with a reason for people.
    Refused(Failure, String),
    LeaseLost,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Ship(#[from] ship::Error),
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
    #[error("work in the background")]
    Task(#[source] tokio::task::JoinError),
    /// Another host could prepare the job.
    #[error("prepare the job on this host: {0}")]
    Host(String),
}

/// Why a job is refused; each reads after "failed to".
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("fetch the {0}: its digest is not the one that was announced")]
    Digest(&'static str),
    #[error("find the working directory {0:?} in the archive")]
    WorkingDirectory(PathBuf),
    #[error("restore the workspace: its {0} is not the one that was approved")]
    NotApproved(&'static str),
    #[error("read the workspace")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Extract(#[from] extract::Error),
    #[error(transparent)]
    RootModule(#[from] root_module::Error),
}

impl Refusal {
    /// Tells a fault of this host, which another may not have, from one of the job.
    fn is_of_this_host(&self) -> bool {
        let source = match self {
            Self::Read(source)
            | Self::Extract(extract::Error::Write { source, .. })
            | Self::RootModule(root_module::Error::Read { source, .. }) => source,
            Self::Digest(_)
            | Self::WorkingDirectory(_)
            | Self::NotApproved(_)
            | Self::Extract(_)
            | Self::RootModule(_) => return false,
        };
        let errno = Errno::from_io_error(source);
        errno.is_some_and(|errno| FAULTS_OF_A_HOST.contains(&errno))
    }
}

const FAULTS_OF_A_HOST: &[Errno] = &[
    Errno::NOSPC,
    Errno::DQUOT,
    Errno::MFILE,
    Errno::NFILE,
    Errno::NOMEM,
    Errno::IO,
    Errno::ROFS,
    Errno::STALE,
    Errno::ACCESS,
    Errno::PERM,
    Errno::MLINK,
];

/// What the job's log says about where its engine came from.
pub(crate) const ENGINE_NOTE: &str = "engine-note";

/// Held while a job is unpacked. Who abandons [`unpack`] must take it before it removes the
/// directory: what was begun in the background goes on, and would make it again.
pub(super) type Unpacking = Arc<tokio::sync::Mutex<()>>;

/// The archive, until it is unpacked.
const ARCHIVE: &str = "archive.tar.gz";

/// Brings what the job needs to this host, however long that takes.
pub(super) async fn fetch(
    shipper: &Shipper,
    directory: &JobDirectory,
    engines: &Arc<Engines>,
    lease: &Lease,
    spec: &Spec,
) -> Result<Fetched, Error> {
    let archive = directory.join(ARCHIVE);
    let kind = match lease.phase {
        Phase::Plan => ArtifactKind::Configuration,
        Phase::Apply => ArtifactKind::Workspace,
    };
    let base = directory.join("state/base");
    let fetch_state = async {
        if spec.has_state {
            shipper.fetch(ArtifactKind::State, &base).await
        } else {
            Ok(ship::Fetched::Digest(String::new()))
        }
    };
    let settings = directory.settings()?;
    let (found, state, engine) = tokio::try_join!(
        async { Ok(shipper.fetch(kind, &archive).await?) },
        async { Ok(fetch_state.await?) },
        provide(engines, &settings),
    )?;
    use ship::Fetched::{Digest, LeaseLost, Refused};
    let found = match (found, state) {
        (Digest(found), Digest(_)) => found,
        (LeaseLost, _) | (_, LeaseLost) => return Ok(Fetched::Ended(Prepared::LeaseLost)),
        (Refused(reason), _) | (_, Refused(reason)) => {
            return Ok(refused(format!("failed to fetch what the job needs: {reason}")));
        }
    };
    match engine {
        Ok(None) => {}
        Ok(Some(note)) => directory.note(ENGINE_NOTE, note.as_bytes())?,
        Err(error) if error.is_of_this_host() => return Err(Error::Host(sentence(&error))),
        Err(error) => return Ok(refused(sentence(&error))),
    }
    Ok(Fetched::Archive(found))
}

fn refused(reason: String) -> Fetched {
    Fetched::Ended(Prepared::Refused(Failure::Errored, reason))
}

/// Unpacks what was fetched, and judges it.
pub(super) async fn unpack(
    directory: &JobDirectory,
    spec: &Spec,
    found: String,
    unpacking: &Unpacking,
) -> Result<Prepared, Error> {
    let engine = directory.settings()?.terraform;
    let archive = directory.join(ARCHIVE);
    let directory = directory.clone();
    let spec = spec.clone();
    let turn = Arc::clone(unpacking).lock_owned().await;
    let unpack = move || {
        let _turn = turn;
        match &spec.approved {
            None => configuration(&directory, &engine, &spec, &archive, &found),
            Some(approved) => workspace(&directory, &spec, approved, &archive, &found),
        }
    };
    let judged = tokio::task::spawn_blocking(unpack).await.map_err(Error::Task)?;
    Ok(match judged {
        Ok(()) => Prepared::Ready,
        Err(refusal) if refusal.is_of_this_host() => {
            return Err(Error::Host(sentence(&refusal)));
        }
        Err(refusal) => {
            let kind = match &refusal {
                Refusal::NotApproved(_) => Failure::PlanChanged,
                Refusal::Digest(_)
                | Refusal::WorkingDirectory(_)
                | Refusal::Read(_)
                | Refusal::Extract(_)
                | Refusal::RootModule(_) => Failure::Errored,
            };
            Prepared::Refused(kind, sentence(&refusal))
        }
    })
}

/// Installs the job's engine where it is not there. Once begun it goes on without the job: the
/// next one finds it installed.
async fn provide(
    engines: &Arc<Engines>,
    settings: &Settings,
) -> Result<Result<Option<String>, InstallError>, Error> {
    let engines = engines.clone();
    let (name, version) = (settings.engine, settings.terraform_version.clone());
    let path = settings.terraform.clone();
    let provide = move || engines.provide(name, &version, &path);
    tokio::task::spawn_blocking(provide).await.map_err(Error::Task)
}

fn configuration(
    directory: &JobDirectory,
    engine: &Path,
    spec: &Spec,
    archive: &Path,
    found: &str,
) -> Result<(), Refusal> {
    if found != spec.archive_digest {
        return Err(Refusal::Digest("configuration"));
    }
    let file = File::open(archive).map_err(Refusal::Read)?;
    extract::extract(file, &directory.join("work"), extract::CONFIGURATION)?;
    fs::remove_file(archive).map_err(Refusal::Read)?;
    let root = directory.root(spec);
    if !root.is_dir() {
        return Err(Refusal::WorkingDirectory(spec.working_directory.clone()));
    }
    root_module::prepare(&root, engine)?;
    Ok(())
}

fn workspace(
    directory: &JobDirectory,
    spec: &Spec,
    approved: &Digests,
    archive: &Path,
    found: &str,
) -> Result<(), Refusal> {
    if found != approved.workspace {
        return Err(Refusal::NotApproved("archive"));
    }
    // Into a directory of its own: nothing in the archive can meet our records.
    let restored = directory.join("restored");
    private_directory(&restored).map_err(|error| match error {
        job_directory::Error::Io { source, .. } => Refusal::Read(source),
        other @ job_directory::Error::Record { .. } => Refusal::Read(io::Error::other(other)),
    })?;
    let file = File::open(archive).map_err(Refusal::Read)?;
    extract::extract(file, &restored, extract::WORKSPACE)?;
    fs::remove_file(archive).map_err(Refusal::Read)?;
    fs::remove_dir(directory.join("work")).map_err(Refusal::Read)?;
    for name in ["work", "plan.bin"] {
        fs::rename(restored.join(name), directory.join(name)).map_err(Refusal::Read)?;
    }
    let plan = digest::of_file(&directory.join("plan.bin")).map_err(Refusal::Read)?;
    if plan != approved.plan {
        return Err(Refusal::NotApproved("saved plan"));
    }
    let lock_file = directory.root(spec).join(".terraform.lock.hcl");
    let lock_file = untrusted::digest(&lock_file).map_err(Refusal::Read)?;
    if lock_file != approved.lock_file {
        return Err(Refusal::NotApproved("lock file"));
    }
    Ok(())
}

fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = format!("failed to {error}");
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_a_fault_of_the_host_and_a_bad_archive_is_not() {
        let full = || io::Error::from(Errno::NOSPC);
        let write = |source| extract::Error::Write { entry: "x".into(), source };
        for (refusal, of_host) in [
            (Refusal::Read(full()), true),
            (Refusal::Extract(write(full())), true),
            (Refusal::Read(io::Error::from(Errno::MFILE)), true),
            (Refusal::Extract(write(Errno::NAMETOOLONG.into())), false),
            (Refusal::Read(io::ErrorKind::NotFound.into()), false),
            (Refusal::Extract(extract::Error::Damaged(io::Error::other("x"))), false),
            (Refusal::Digest("configuration"), false),
        ] {
            assert_eq!(refusal.is_of_this_host(), of_host, "{refusal:?}");
        }
    }
}

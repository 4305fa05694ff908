//! What jobs have left on this host: what could not be removed, and what nobody took. Both are
//! tried again for as long as the agent lives.

use std::path::{Path, PathBuf};

use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::time::{Duration, sleep};
use tonic::transport::Channel;

use crate::job_directory::{self, JobDirectory};
use crate::ship::{self, Quarantined, Shipper};

const SWEEPS: Duration = Duration::from_secs(10 * 60);

/// A limit may have been raised, or room been made, by then.
const OFFERS: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
    #[error(transparent)]
    Ship(#[from] ship::Error),
    #[error("work in the background")]
    Task(#[from] tokio::task::JoinError),
}

/// Looks after them from now on.
pub(super) fn look_after(client: RunnerServiceClient<Channel>, work_dir: &Path) {
    let (jobs, kept) = (work_dir.join("jobs"), work_dir.join("kept"));
    tokio::spawn(async move {
        loop {
            sleep(SWEEPS).await;
            let of = jobs.clone();
            match tokio::task::spawn_blocking(move || JobDirectory::sweep(&of)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn(&error.into()),
                Err(error) => warn(&error.into()),
            }
        }
    });
    tokio::spawn(async move {
        loop {
            if let Err(error) = offer_all(&client, kept.clone()).await {
                warn(&error);
            }
            sleep(OFFERS).await;
        }
    });
}

async fn offer_all(client: &RunnerServiceClient<Channel>, kept: PathBuf) -> Result<(), Error> {
    if !kept.exists() {
        return Ok(());
    }
    let found = tokio::task::spawn_blocking(move || {
        let found = JobDirectory::list(&kept)?;
        found.iter().for_each(JobDirectory::trim);
        Ok::<_, job_directory::Error>(found)
    });
    for directory in found.await?? {
        if let Err(error) = offer(client, directory).await {
            warn(&error);
        }
    }
    Ok(())
}

/// Offers what nobody took once more, to be kept beside its run.
async fn offer(
    client: &RunnerServiceClient<Channel>,
    directory: JobDirectory,
) -> Result<(), Error> {
    let lease = directory.lease()?;
    let shipper = Shipper::new(client.clone(), lease.clone(), directory.clone());
    match shipper.quarantine().await? {
        Quarantined::Whole => {
            tracing::info!(?lease, "what was kept on this host is in quarantine");
            tokio::task::spawn_blocking(move || directory.wipe()).await??;
        }
        Quarantined::Refused => {
            let path = directory.path().display();
            tracing::warn!(?lease, %path, "what nobody takes stays on this host");
        }
    }
    Ok(())
}

fn warn(error: &Error) {
    let error = error as &dyn std::error::Error;
    tracing::warn!(error, "failed to look after what jobs have left");
}

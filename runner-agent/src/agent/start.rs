//! What comes before the agent's loop: the directory, the engines, the identity, the host.
//!
//! Each may take its time: an engine a minute to answer, a control plane for ever. A wish to end
//! is heard meanwhile. It is met at once where it leaves the jobs of this host to others, or where
//! there are none. Else they are to be brought to their end: what they do without is not waited
//! for, and the loop takes them up and does the rest.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::intake::Intake;
use super::seen::Seen;
use super::service::Service;
use super::told::Rest;
use super::wish::Wish;
use super::{Agent, Error, LARGEST_FRAME, leftovers};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::engine::{self, EngineSettings, Engines, GiveUp};
use crate::enroll::Identity;
use crate::job_directory::{JobDirectory, Settings, create_private, private_directory};
use crate::supervisor::confine::Isolation;
use crate::supervisor::isolation;
use crate::{random, spool};

/// How long a search that is given up may take to end what it has started.
const FAREWELL: Duration = Duration::from_secs(3);

/// Runs the agent until it is wished to end, or does by itself with `--once` and a time-out.
pub(super) async fn serve(config: Config, wish: watch::Receiver<Wish>) -> Result<(), Error> {
    let lock = claim(&config.work_dir)?;
    let jobs_path = config.work_dir.join("jobs");
    private_directory(&jobs_path)?;
    // Whoever is to drain has these to bring to their end.
    let bar = if JobDirectory::list(&jobs_path)?.is_empty() { Wish::Drain } else { Wish::Leave };
    let engines = find_engines(config.engines.clone(), &wish).await?;
    let wished_so_far = *wish.borrow();
    if wished_so_far >= bar {
        return leave(wished_so_far);
    }
    let identity = tokio::select! {
        identity = identity(&config) => identity?,
        wish = wished(&wish, bar) => return leave(wish),
    };
    // Before any job is confined: what is not there cannot be allowed.
    private_directory(&config.provider_cache)?;
    let isolation = tokio::select! {
        facts = isolation::probe(&config.program, &config.work_dir, &config.confinement) => facts,
        wish = wished(&wish, bar) => return leave(wish),
    };
    let client = RunnerServiceClient::new(identity.channel(&config)?)
        .max_decoding_message_size(LARGEST_FRAME);
    tracing::info!(
        runner_id = %identity.runner_id,
        engines = %engines.names(),
        "the runner starts"
    );
    let (events_to, events) = mpsc::channel(64);
    let mut pulse = interval(Service::pulse());
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut agent = Agent {
        settings: settings(&config),
        engines,
        client,
        jobs_path,
        jobs: HashMap::new(),
        events_to,
        events,
        named: Vec::new(),
        wish,
        intake: Intake::new(config.accepts),
        settles: None,
        idle_since: Instant::now(),
        rest: Rest::default(),
        room: spool::watch(&config.work_dir, config.spool),
        seen: Seen::open(&config.work_dir),
        service: Service::new(),
        pulse,
        isolation,
        said: String::new(),
        config,
        _lock: lock,
    };
    let missing = &agent.isolation.missing;
    if agent.config.confinement.isolation == Isolation::Required && !missing.is_empty() {
        tracing::error!(
            ?missing,
            "this host lacks what --isolation=required wants: no job is taken"
        );
        agent.intake.refuse_all();
    }
    agent.find_jobs()?;
    if *agent.wish.borrow() >= Wish::Drain {
        // The first `Hello` says so: nothing is offered.
        agent.intake.leave();
    }
    leftovers::look_after(agent.client.clone(), &agent.config.work_dir);
    agent.run().await;
    Ok(())
}

/// Takes the work directory, for as long as the file lives.
fn claim(work_dir: &Path) -> Result<File, Error> {
    private_directory(work_dir)?;
    let lock = create_private(&work_dir.join("lock")).map_err(Error::Runtime)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| Error::InUse(work_dir.to_owned()))?;
    Ok(lock)
}

/// Waits until so much is wished, or more.
async fn wished(wish: &watch::Receiver<Wish>, bar: Wish) -> Wish {
    match wish.clone().wait_for(|wish| *wish >= bar).await {
        Ok(wish) => *wish,
        // Whoever could wish is gone: that is one, too.
        Err(_) => Wish::Leave,
    }
}

fn leave(wish: Wish) -> Result<(), Error> {
    tracing::info!(?wish, "the runner leaves before it has begun");
    Ok(())
}

/// Finds them, or none when this process is wished to end meanwhile: what runs has its own.
async fn find_engines(
    settings: EngineSettings,
    wish: &watch::Receiver<Wish>,
) -> Result<Arc<Engines>, Error> {
    let give_up = GiveUp::default();
    let given = give_up.clone();
    let unasked = settings.clone();
    let mut search = tokio::task::spawn_blocking(move || Engines::find(settings, &given));
    let found = tokio::select! {
        found = &mut search => found,
        _ = wished(wish, Wish::Drain) => {
            give_up.now();
            // What was being asked is ended before this process is.
            if tokio::time::timeout(FAREWELL, search).await.is_err() {
                tracing::warn!("an engine that was asked for its version is still there");
            }
            return Ok(Arc::new(Engines::without_looking(unasked)));
        }
    };
    let engines = found.map_err(|error| Error::Runtime(error.into()))??;
    Ok(Arc::new(engines))
}

/// Enrols, however long the control plane cannot be reached.
async fn identity(config: &Config) -> Result<Identity, Error> {
    let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
    loop {
        match Identity::obtain(config).await {
            Ok(identity) => return Ok(identity),
            Err(error) if error.may_pass() => {
                let wait = backoff.next(random::fraction());
                tracing::warn!(error = &error as &dyn std::error::Error, ?wait, "failed to enrol");
                tokio::time::sleep(wait).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Answers what the configuration contributes to each job.
fn settings(config: &Config) -> Settings {
    Settings {
        // Each job's own.
        engine: engine::Name::default(),
        terraform: PathBuf::new(),
        terraform_version: String::new(),
        provider_cache: Some(config.provider_cache.clone()),
        provider_cache_limit: config.provider_cache_limit,
        pass_env: config.pass_env.clone(),
        terraform_cli_config: config.terraform_cli_config.clone(),
        longest_log: config.longest_log,
        spool_limit: config.spool.spool,
        low_water: config.spool.low_water,
        confinement: config.confinement.clone(),
        hooks: config.hooks.clone(),
    }
}

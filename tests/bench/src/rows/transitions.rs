//! `transitions`: durable commits through the store, beside an append log that shares its syncs
//! as the store does.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use latchkey_control_plane::audit::{Draft, Head, Unplaced};
use latchkey_control_plane::store::record::encode;
use latchkey_control_plane::store::record::environment::EnvironmentRecord;
use latchkey_control_plane::store::record::run::RunRecord;
use latchkey_control_plane::store::sled::{Options, Sled};
use latchkey_control_plane::store::{Batch, Expect, Key, Store, Version, keys};
use latchkey_domain::id::{EnvironmentId, OrganizationId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::row::{Budget, Context, Figure, Limit, Measurement, Row};
use crate::sample;

pub(crate) const MEASUREMENT: Measurement = Measurement {
    name: "transitions",
    what: "durable commits per second through the store, 1 to 1,024 callers",
    measure: |context| Box::pin(measure(context)),
};

const CALLERS: [usize; 4] = [1, 64, 256, 1024];
/// As many as the store's writer takes at once.
const GROUP: usize = 512;

async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let span = Duration::from_millis(context.pick(400, 3000) as u64);
    let transitions = Arc::new(Transition::all(CALLERS[CALLERS.len() - 1]));
    let bytes = transitions[0].bytes().len();
    let mut rows = Vec::new();
    for callers in CALLERS {
        let appended = append(&transitions, callers, span).await?;
        let committed = commit(&transitions, callers, span).await?;
        rows.push(Row {
            name: format!("transitions, {callers} callers"),
            figure: committed,
            limit: Some(Limit { what: "append log, shared fdatasync", figure: appended }),
            budget: Budget::RatioAtLeast(0.5),
            note: format!(
                "In process, through the `Store` port on sled: each commit expects a version, \
                 writes a run of {} bytes, checks its environment and has one audit record \
                 stamped: {bytes} bytes in all. The limit appends the same bytes, one write and \
                 one fdatasync for all that wait, up to {GROUP}. One writer commits for all \
                 callers, so more callers share a sync until the writer's own work (judging, \
                 stamping, sled) is the limit; beyond that more callers only wait longer. At 10 \
                 and 100 times the records the cost per commit grows with the depth of sled's \
                 tree, and, where the pages no longer fit its cache, by a read each.",
                transitions[0].value.len()
            ),
        });
    }
    Ok(rows)
}

/// What one caller writes over and over.
struct Transition {
    run: Key,
    environment: Key,
    value: Vec<u8>,
    environment_value: Vec<u8>,
    draft: Draft,
}

impl Transition {
    fn all(count: usize) -> Vec<Self> {
        let organization = OrganizationId::from_bytes([1; 16]);
        (0..count as u64)
            .map(|number| {
                let environment = EnvironmentId::from_bytes(u128::from(number).to_be_bytes());
                let run = sample::finished_run(number, organization, environment);
                let draft = sample::audit_drafts(number, organization).next();
                let record = sample::environment(environment, organization);
                Self {
                    run: keys::run(run.id),
                    environment: keys::environment(organization, environment),
                    value: encode(&RunRecord::from(&run)),
                    environment_value: encode(&EnvironmentRecord::from(&record)),
                    draft: draft.expect("a run tells something"),
                }
            })
            .collect()
    }

    /// What reaches the disk at the least.
    fn bytes(&self) -> Vec<u8> {
        let (record, _) = Unplaced::from(self.draft.clone()).stamp(Head::START);
        [self.run.as_bytes(), &self.value, &record].concat()
    }
}

async fn commit(
    transitions: &Arc<Vec<Transition>>,
    callers: usize,
    span: Duration,
) -> anyhow::Result<Figure> {
    let directory = tempfile::tempdir()?;
    let options = Options::new(directory.path().join("store"));
    let store = Arc::new(tokio::task::spawn_blocking(move || Sled::open(&options)).await??);
    let mut batch = Batch::new();
    for one in &transitions[..callers] {
        batch = batch.put(one.run.clone(), Expect::Absent, one.value.clone()).put(
            one.environment.clone(),
            Expect::Absent,
            one.environment_value.clone(),
        );
    }
    let made = store.commit(batch).await?;
    let begun = Instant::now();
    let mut calling = JoinSet::new();
    for caller in 0..callers {
        let (store, transitions) = (Arc::clone(&store), Arc::clone(transitions));
        calling.spawn(async move {
            let one = &transitions[caller];
            let mut version: Version = made;
            let mut count = 0;
            while begun.elapsed() < span {
                let batch = Batch::new()
                    .put(one.run.clone(), Expect::At(version), one.value.clone())
                    .check(one.environment.clone(), Expect::At(made))
                    .audit(one.draft.clone());
                version = store.commit(batch).await?;
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let count = sum(calling).await?;
    let taken = begun.elapsed();
    tokio::task::spawn_blocking(move || drop(store)).await?;
    Ok(Figure::per_second(count, taken))
}

async fn append(
    transitions: &Arc<Vec<Transition>>,
    callers: usize,
    span: Duration,
) -> anyhow::Result<Figure> {
    let directory = tempfile::tempdir()?;
    let file = File::create(directory.path().join("log"))?;
    let (jobs, queue) = mpsc::channel(1024);
    let writer = std::thread::spawn(move || write(file, queue));
    let begun = Instant::now();
    let mut calling = JoinSet::new();
    for caller in 0..callers {
        let (jobs, bytes) = (jobs.clone(), transitions[caller].bytes());
        calling.spawn(async move {
            let mut count = 0;
            while begun.elapsed() < span {
                let (answer, answered) = oneshot::channel();
                jobs.send((bytes.clone(), answer)).await.context("the writer has ended")?;
                answered.await.context("the writer has ended")?;
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let count = sum(calling).await?;
    let taken = begun.elapsed();
    drop(jobs);
    writer.join().map_err(|_| anyhow::anyhow!("append: the writer panicked"))??;
    Ok(Figure::per_second(count, taken))
}

type Job = (Vec<u8>, oneshot::Sender<()>);

fn write(mut file: File, mut queue: mpsc::Receiver<Job>) -> std::io::Result<()> {
    while let Some((mut bytes, answer)) = queue.blocking_recv() {
        let mut answers = vec![answer];
        while answers.len() < GROUP
            && let Ok((more, answer)) = queue.try_recv()
        {
            bytes.extend(more);
            answers.push(answer);
        }
        file.write_all(&bytes)?;
        file.sync_data()?;
        for answer in answers {
            // Its caller may have been stopped.
            let _ = answer.send(());
        }
    }
    Ok(())
}

async fn sum(mut calling: JoinSet<anyhow::Result<usize>>) -> anyhow::Result<usize> {
    let mut count = 0;
    while let Some(counted) = calling.join_next().await {
        count += counted??;
    }
    Ok(count)
}

//! `history`: a control plane with a year of a large company's runs behind it: start, list, show,
//! memory, disk.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use latchkey_control_plane::store::record::run::RunRecord;
use latchkey_control_plane::store::record::{Text, encode};
use latchkey_control_plane::store::sled::{Options, Sled};
use latchkey_control_plane::store::{Batch, Expect, Store, Versioned, keys};
use latchkey_domain::id::{EnvironmentId, OrganizationId, UserId};
use latchkey_harness::Stage;
use latchkey_proto::v1;
use tokio::task::JoinSet;

use crate::bed::Bed;
use crate::observed::{on_disk, resident};
use crate::row::{Budget, Context, Figure, Measurement, Row, percentile};
use crate::sample;

pub(crate) const MEASUREMENT: Measurement = Measurement {
    name: "history",
    what: "1,000,000 finished runs with their audit: start, list, show, memory, disk",
    measure: |context| Box::pin(measure(context)),
};

const ENVIRONMENTS: usize = 100;
/// Runs of one batch.
const BATCH: u64 = 50;
/// Audit records of one file of the store.
const SEGMENT: u64 = 4096;
/// Batches under way.
const AT_ONCE: usize = 8;
/// Filling ends here, with what there is by then.
const PATIENCE: Duration = Duration::from_secs(900);

async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let wanted = context.pick(20_000, 1_000_000) as u64;
    let mut bed = Bed::start().await?;
    let environments = bed.environments(ENVIRONMENTS).await?;
    bed.plane.stop().await?;
    let begun = Instant::now();
    let runs = fill(&bed, &environments, wanted).await?;
    let filling = begun.elapsed();

    let begun = Instant::now();
    bed.plane.restart().await?;
    let start = begun.elapsed();
    let after_start = resident(bed.pid()?)?;
    let calls = context.pick(200, 2000) as u64;
    let mut show = show_some(&bed, runs, calls).await?;
    let mut list = list_some(&bed, &environments, runs, calls / 2).await?;
    let after_calls = resident(bed.pid()?)?;
    let disk = on_disk(&bed.plane.data_dir())?;

    let honest = if runs == wanted {
        String::new()
    } else {
        format!(" {wanted} were wanted; filling was stopped after {} s.", PATIENCE.as_secs())
    };
    let how = format!(
        "{runs} finished runs in {ENVIRONMENTS} environments, with {} audit records, an index \
         entry and a request each, put through the `Store` port in batches of {BATCH} runs \
         ({:.0} s), then a control plane started on them.{honest} Their logs and blobs are not \
         there: those are files that a start does not read.",
        sample::audit_records(),
        filling.as_secs_f64()
    );
    let row = |what: &str, figure, budget, note: &str| Row {
        name: format!("history of {runs}, {what}"),
        figure,
        limit: None,
        budget,
        note: note.to_owned(),
    };
    let per_run = |bytes: u64| Figure::kibibytes(bytes as f64 / runs as f64);
    Ok(vec![
        row(
            "start",
            Figure::millis(start),
            Budget::FigureAtMost(3000.0),
            &format!(
                "{how} From exec to the ready file, looked for every 15 ms, after a proper stop. \
                 Sled reads its snapshot and the log behind it; that the audit has files of its own \
                 has not shortened it. It grows with the records: 10 times the runs is about 10 \
                 times the time. Only runs that have not ended are read by the control plane \
                 itself."
            ),
        ),
        row(
            "GetRun p99",
            Figure::millis(percentile(&mut show, 0.99)),
            Budget::FigureAtMost(10.0),
            &format!(
                "One caller, {calls} runs spread over all; p50 {}. A few records are fetched, \
                 each by its key: the depth of a tree at 10 and 100 times the size. The lengths \
                 of its logs are in its record; the changes of its plan, which are pruned with \
                 age, are looked for.",
                Figure::millis(percentile(&mut show, 0.5))
            ),
        ),
        row(
            "ListRuns p99",
            Figure::millis(percentile(&mut list, 0.99)),
            Budget::FigureAtMost(10.0),
            &format!(
                "One caller, pages of 50, half of them the newest of an environment, half \
                 somewhere within; p50 {}. A page costs its 50 runs, each record by its key, \
                 however long the list.",
                Figure::millis(percentile(&mut list, 0.5))
            ),
        ),
        row(
            "memory",
            Figure::mebibytes(after_calls as f64),
            Budget::None,
            &format!(
                "VmRSS after the calls; {} after the start; {} for each run. Sled keeps a table \
                 of all its pages in memory, so it grows with the records.",
                Figure::mebibytes(after_start as f64),
                per_run(after_calls)
            ),
        ),
        row(
            "disk",
            Figure::mebibytes(disk as f64),
            Budget::None,
            &format!(
                "Blocks of the whole data directory; {} for each run. It grows with the records.",
                per_run(disk)
            ),
        ),
    ])
}

/// Puts finished runs into the stopped control plane's store, and returns how many.
async fn fill(bed: &Bed, environments: &[String], wanted: u64) -> anyhow::Result<u64> {
    let options = Options::new(bed.plane.data_dir().join("store"));
    let store = Arc::new(tokio::task::spawn_blocking(move || Sled::open(&options)).await??);
    let organization = id(store.fetch(&keys::organization_by_name(Stage::ORGANIZATION)).await?)?;
    let organization: OrganizationId = organization.parse()?;
    let mut ids = Vec::new();
    for name in environments {
        let found = store.fetch(&keys::environment_by_name(organization, name)).await?;
        ids.push(id(found)?.parse::<EnvironmentId>()?);
    }
    let ids: Arc<[EnvironmentId]> = ids.into();
    let begun = Instant::now();
    let mut committing = JoinSet::new();
    let mut first = 0;
    while first < wanted && begun.elapsed() < PATIENCE {
        let last = wanted.min(first + BATCH);
        let (store, ids) = (Arc::clone(&store), Arc::clone(&ids));
        committing.spawn(async move {
            let mut batch = Batch::new();
            for number in first..last {
                batch = add(batch, number, organization, environment_of(&ids, number));
            }
            store.commit(batch).await
        });
        if committing.len() == AT_ONCE
            && let Some(committed) = committing.join_next().await
        {
            committed??;
        }
        first = last;
    }
    while let Some(committed) = committing.join_next().await {
        committed??;
    }
    await_segments(&bed.plane.data_dir().join("store"), first).await?;
    tokio::task::spawn_blocking(move || drop(store)).await?;
    Ok(first)
}

/// Waits until the store has moved the audit of so many runs into files, but for its tail: a
/// control plane that lived through them had the time.
async fn await_segments(store: &Path, runs: u64) -> anyhow::Result<()> {
    let most = Duration::from_secs(300);
    let wanted = (runs * sample::audit_records() as u64 / SEGMENT).saturating_sub(2);
    let begun = Instant::now();
    loop {
        let found = files_under(&store.join("audit"))?;
        if found >= wanted {
            return Ok(());
        }
        anyhow::ensure!(begun.elapsed() < most, "wait for segments: {found} of {wanted}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn files_under(directory: &Path) -> anyhow::Result<u64> {
    if !directory.exists() {
        return Ok(0);
    }
    let mut files = 0;
    for entry in std::fs::read_dir(directory).context("list the audit's files")? {
        let path = entry?.path();
        files += if path.is_dir() { files_under(&path)? } else { 1 };
    }
    Ok(files)
}

fn add(
    batch: Batch,
    number: u64,
    organization: OrganizationId,
    environment: EnvironmentId,
) -> Batch {
    let run = sample::finished_run(number, organization, environment);
    let request =
        keys::request(UserId::from_bytes([4; 16]), &format!("run:{organization}:{}", run.id));
    let batch = batch
        .put(keys::run(run.id), Expect::Absent, encode(&RunRecord::from(&run)))
        .put(keys::run_by_environment(environment, run.id), Expect::Absent, [])
        .put(request, Expect::Absent, encode(&Text(run.id)));
    sample::audit_drafts(number, organization).fold(batch, Batch::audit)
}

fn environment_of<T: Copy>(environments: &[T], number: u64) -> T {
    environments[usize::try_from(number).unwrap_or(0) % environments.len()]
}

/// Reads an id that a name points to.
fn id(found: Option<Versioned>) -> anyhow::Result<String> {
    let found = found.context("find a record of the bed")?;
    Ok(serde_json::from_slice(&found.value)?)
}

/// A number below `count`, spread over all.
fn somewhere(step: u64, count: u64) -> u64 {
    step.wrapping_mul(0x9e37_79b9_7f4a_7c15) % count
}

async fn show_some(bed: &Bed, runs: u64, calls: u64) -> anyhow::Result<Vec<Duration>> {
    let mut samples = Vec::new();
    for step in 0..calls {
        let run_id = sample::run_id(somewhere(step, runs)).to_string();
        let begun = Instant::now();
        bed.owner.runs().get_run(v1::GetRunRequest { run_id }).await?;
        samples.push(begun.elapsed());
    }
    // The first connects.
    samples.remove(0);
    Ok(samples)
}

async fn list_some(
    bed: &Bed,
    environments: &[String],
    runs: u64,
    calls: u64,
) -> anyhow::Result<Vec<Duration>> {
    let mut samples = Vec::new();
    for step in 0..calls {
        let number = somewhere(step, runs);
        let environment = environment_of(&environments.iter().collect::<Vec<_>>(), number);
        let within = sample::run_id(number).to_string();
        let request = v1::ListRunsRequest {
            organization: Stage::ORGANIZATION.to_owned(),
            environment: environment.clone(),
            page_size: 50,
            page_token: if step % 2 == 0 { String::new() } else { within },
        };
        let begun = Instant::now();
        bed.owner.runs().list_runs(request).await?;
        samples.push(begun.elapsed());
    }
    Ok(samples)
}

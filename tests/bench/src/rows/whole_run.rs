//! A whole run with a real terraform, against the same commands run bare.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use latchkey_harness::{Configuration, Stage, StageOptions, engine, is_ended};
use latchkey_proto::v1::{self, RunKind, RunState};
use tokio::process::Command;

use crate::programs;
use crate::row::{Budget, Context, Figure, Limit, Row, percentile};
use crate::timed_runs::{prepare, watch};

const RESOURCES: usize = 20;

/// `local-exec` of the configuration that takes a minute.
const MINUTE: &str = "resource \"terraform_data\" \"minute\" {
  provisioner \"local-exec\" {
    command = \"sleep 60\"
  }
}
";

pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let mut stage = Stage::start(StageOptions::new(programs::programs()?)).await?;
    let small: String = (0..RESOURCES)
        .map(|n| format!("resource \"terraform_data\" \"r{n}\" {{\n  input = \"{n}\"\n}}\n"))
        .collect();
    let pairs = context.pick(3, 11);
    let compared = compare(&stage, "small", &small, pairs).await?;
    let small_note = format!(
        "{pairs} pairs, each in turn, medians; {RESOURCES} terraform_data, policy never, \
         auto-apply, no AWS credentials. QueueRun sent → a watcher has the end. Bare: init, \
         plan -out, show and show -json side by side, show -json, apply, as Latchkey runs them, \
         with a local backend, while Latchkey's state goes through its supervisor to the control \
         plane. {}. Grows with the number of state snapshots and with the bytes of plan and log; \
         the fixed part is the same for 10 and 100 times the resources, so the ratio falls",
        compared.phases
    );
    let mut rows =
        vec![compared.row("whole run, small", 1.25, small_note), bare_row(&small, pairs).await?];
    if !context.quick {
        let compared = compare(&stage, "minute", MINUTE, 2).await?;
        let note = format!(
            "2 pairs; one terraform_data with a local-exec that sleeps 60 s. {}",
            compared.phases
        );
        rows.push(compared.row("whole run, one minute", 1.02, note));
    }
    anyhow::ensure!(stage.ended().is_none(), "keep the stage alive");
    Ok(rows)
}

struct Compared {
    latchkey: Duration,
    bare: Duration,
    /// Where Latchkey's time went.
    phases: String,
}

impl Compared {
    fn row(&self, name: &str, budget: f64, note: String) -> Row {
        Row {
            name: name.to_owned(),
            figure: Figure::millis(self.latchkey),
            limit: Some(Limit {
                what: "the same terraform commands, bare",
                figure: Figure::millis(self.bare),
            }),
            budget: Budget::RatioAtMost(budget),
            note,
        }
    }
}

/// Runs both in turn, so that what else the machine does hits both.
async fn compare(stage: &Stage, name: &str, main: &str, pairs: usize) -> anyhow::Result<Compared> {
    let configuration = Configuration::of(&[("main.tf", main)]);
    let (mut latchkey, mut bare) = (Vec::new(), Vec::new());
    let mut phases = Phases::default();
    // The first pair is not counted.
    let warm_up = usize::from(pairs > 2);
    for number in 0..pairs + warm_up {
        // A new one each time: with its state from before there would be nothing to apply.
        let prepared = prepare(&stage.owner, &format!("{name}-{number}"), &configuration).await?;
        let queued = prepared.queue(&stage.owner, RunKind::PlanAndApply).await?;
        let ended = watch(&stage.owner, &queued.run_id, is_ended).await?;
        anyhow::ensure!(ended.run.state() == RunState::Applied, "apply: {}", ended.run.reason);
        let same = bare_same(main).await?;
        if number >= warm_up {
            latchkey.push(ended.at.since(queued.sent));
            bare.push(same);
            phases.add(&ended.run);
        }
    }
    Ok(Compared {
        latchkey: percentile(&mut latchkey, 0.5),
        bare: percentile(&mut bare, 0.5),
        phases: phases.to_string(),
    })
}

/// Medians of the steps that the run itself tells, in milliseconds.
#[derive(Default)]
struct Phases {
    plan_waited: Vec<Duration>,
    plan: Vec<Duration>,
    apply_waited: Vec<Duration>,
    apply: Vec<Duration>,
}

impl Phases {
    fn add(&mut self, run: &v1::Run) {
        for (facts, waited, worked) in [
            (&run.plan, &mut self.plan_waited, &mut self.plan),
            (&run.apply, &mut self.apply_waited, &mut self.apply),
        ] {
            let Some(facts) = facts else { continue };
            let (Some(queued), Some(started), Some(ended)) =
                (&facts.queue_time, &facts.start_time, &facts.end_time)
            else {
                continue;
            };
            let nanos =
                |seconds: i64, nanos: i32| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            let between = |from: i128, to: i128| {
                Duration::from_nanos(u64::try_from(to - from).unwrap_or_default())
            };
            let queued = nanos(queued.seconds, queued.nanos);
            let started = nanos(started.seconds, started.nanos);
            waited.push(between(queued, started));
            worked.push(between(started, nanos(ended.seconds, ended.nanos)));
        }
    }
}

impl std::fmt::Display for Phases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let middle = |samples: &[Duration]| percentile(&mut samples.to_vec(), 0.5).as_millis();
        write!(
            f,
            "Medians: plan queued to released {} ms, then to its end {} ms; apply queued to \
             released {} ms, then to its end {} ms",
            middle(&self.plan_waited),
            middle(&self.plan),
            middle(&self.apply_waited),
            middle(&self.apply)
        )
    }
}

/// `init`, `plan -out`, `apply`, as a person would.
async fn bare_row(main: &str, repeats: usize) -> anyhow::Result<Row> {
    let mut taken = Vec::new();
    for _ in 0..repeats {
        let bare = Bare::new(main)?;
        let start = Instant::now();
        bare.run(&["init", "-input=false", "-no-color"]).await?;
        bare.run(&["plan", "-input=false", "-no-color", "-out=plan.bin"]).await?;
        bare.run(&["apply", "-input=false", "-no-color", "plan.bin"]).await?;
        taken.push(start.elapsed());
    }
    Ok(Row {
        name: "whole run, small, as a person types it".into(),
        figure: Figure::millis(percentile(&mut taken, 0.5)),
        limit: None,
        budget: Budget::None,
        note: "init, plan -out and apply with a local backend and nothing else: for the record"
            .into(),
    })
}

/// The commands of `runner-agent`'s plan and apply.
async fn bare_same(main: &str) -> anyhow::Result<Duration> {
    let bare = Bare::new(main)?;
    let start = Instant::now();
    bare.run(&["init", "-input=false", "-no-color", "-json"]).await?;
    let plan = ["plan", "-input=false", "-no-color", "-json", "-detailed-exitcode"];
    bare.run(&[&plan[..], &["-out=plan.bin"]].concat()).await?;
    tokio::try_join!(
        bare.run(&["show", "-no-color", "plan.bin"]),
        bare.run(&["show", "-json", "plan.bin"])
    )?;
    bare.run(&["show", "-json", "plan.bin"]).await?;
    bare.run(&["apply", "-input=false", "-no-color", "-json", "plan.bin"]).await?;
    Ok(start.elapsed())
}

struct Bare {
    directory: tempfile::TempDir,
    terraform: std::path::PathBuf,
}

impl Bare {
    fn new(main: &str) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("latchkey-bare-").tempdir()?;
        fs::write(directory.path().join("main.tf"), main)?;
        Ok(Self { directory, terraform: engine::find()? })
    }

    async fn run(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let path: &Path = self.directory.path();
        let raw = File::options().create(true).append(true).open(path.join("raw"))?;
        let status = Command::new(&self.terraform)
            .args(arguments)
            .current_dir(path)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", path)
            .env("TF_INPUT", "0")
            .env("TF_IN_AUTOMATION", "1")
            .env("CHECKPOINT_DISABLE", "1")
            .stdin(Stdio::null())
            .stdout(raw.try_clone()?)
            .stderr(raw)
            .status()
            .await
            .context("start a bare terraform")?;
        // 2 is a plan with changes.
        anyhow::ensure!(matches!(status.code(), Some(0 | 2)), "run {arguments:?}: {status}");
        Ok(())
    }
}

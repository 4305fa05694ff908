//! The promises, looked at from outside: by the ledger, the logs, the host and the API.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use latchkey_harness::stub::{Entry, What, line};
use latchkey_harness::wait_for;
use latchkey_proto::v1::{self, Phase, RunState};
use tonic::Code;

use crate::bed::{Bed, Engine};
use crate::processes;
use crate::story::{Action, Expect, Seen};

/// How long what is over may still take to leave.
const LEAVING: Duration = Duration::from_secs(5);

/// A broken promise.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) detail: String,
}

/// Looks at a round that is over, with everything healed.
pub(crate) async fn look(bed: &Bed, seen: &Seen) -> anyhow::Result<Vec<Violation>> {
    let mut found = Found(Vec::new());
    for (invariant, detail) in &seen.problems {
        found.says(invariant, detail.clone());
    }
    let ledger: Vec<Entry> =
        bed.stub.ledger()?.into_iter().filter(|entry| entry.run_id == seen.run_id).collect();
    starts(bed, seen, &ledger, &mut found);
    if seen.run_id.is_empty() || !found.0.is_empty() {
        return Ok(found.0);
    }
    match seen.plan.engine {
        Engine::Stub => {
            log(bed, seen, &ledger, Phase::Plan, &mut found).await?;
            log(bed, seen, &ledger, Phase::Apply, &mut found).await?;
            states(bed, seen, &ledger, &mut found).await?;
            result(seen, &ledger, &mut found);
        }
        Engine::Real => real_log(bed, seen, &mut found).await?,
    }
    success(seen, &mut found);
    for code in &seen.codes {
        let count = bed.aws.simulator().requests_with_code(code);
        found.unless(count <= 1, "a code reaches STS at most once", || {
            format!("one did {count} times")
        });
    }
    let verified = bed.owner.verify_audit().await?;
    found.unless(verified.intact, "the audit chain verifies", || verified.problem);
    host(bed, &mut found).await;
    Ok(found.0)
}

struct Found(Vec<Violation>);

impl Found {
    fn says(&mut self, invariant: &'static str, detail: String) {
        self.0.push(Violation { invariant, detail });
    }

    fn unless(&mut self, holds: bool, invariant: &'static str, detail: impl FnOnce() -> String) {
        if !holds {
            self.says(invariant, detail());
        }
    }
}

fn starts(_bed: &Bed, seen: &Seen, ledger: &[Entry], found: &mut Found) {
    let count = match seen.plan.engine {
        Engine::Stub => {
            let is_start = |entry: &&Entry| entry.phase == "apply" && entry.what == What::Started;
            ledger.iter().filter(is_start).count()
        }
        Engine::Real => fs::read_to_string(&seen.notes).unwrap_or_default().lines().count(),
    };
    found.unless(count <= 1, "one start of apply per approval", || {
        format!("run {} was applied {count} times", seen.run_id)
    });
}

/// Every start's lines are there from the first on, once, in order, unchanged; and all of them,
/// for one start of the phase at least.
async fn log(
    bed: &Bed,
    seen: &Seen,
    ledger: &[Entry],
    phase: Phase,
    found: &mut Found,
) -> anyhow::Result<()> {
    const INVARIANT: &str = "the log is what terraform printed";
    let name = if phase == Phase::Plan { "plan" } else { "apply" };
    let bytes = bed.owner.read_log(&seen.run_id, phase).await?;
    let text = String::from_utf8_lossy(&bytes);
    let mut printed: BTreeMap<String, u64> = BTreeMap::new();
    for entry in text.lines().filter(|line| line.contains("\"@message\":\"stub ")) {
        let mut words = entry.split("\"stub ").nth(1).unwrap_or_default().split(' ');
        let start = words.next().unwrap_or_default().to_owned();
        let next = printed.entry(start.clone()).or_default();
        if entry != line(&start, *next, seen.plan.script.padding) {
            let short: String = entry.chars().take(120).collect();
            found.says(INVARIANT, format!("{name}: line {next} of {start} is {short}"));
            return Ok(());
        }
        *next += 1;
    }
    let is_start = |entry: &&Entry| entry.phase == name && entry.what == What::Started;
    let starts: Vec<&Entry> = ledger.iter().filter(is_start).collect();
    // It may have died between a line and its count.
    let whole = |entry: &&&Entry| {
        let (there, counted) =
            (printed.get(&entry.start).copied().unwrap_or(0), bed.stub.printed(&entry.start));
        there == counted || there == counted + 1
    };
    let complete = starts.is_empty() || starts.iter().any(|entry| whole(&entry));
    found.unless(complete, INVARIANT, || {
        let counts = starts.iter().map(|entry| bed.stub.printed(&entry.start));
        format!("{name}: printed {:?}, in the log {:?}", counts.collect::<Vec<_>>(), printed)
    });
    Ok(())
}

/// The newest state that was acknowledged is current, or a person is told to look.
async fn states(bed: &Bed, seen: &Seen, ledger: &[Entry], found: &mut Found) -> anyhow::Result<()> {
    const INVARIANT: &str = "no state is lost";
    let newest = ledger.iter().filter_map(|entry| match entry.what {
        What::State { serial } | What::Errored { serial } => Some(serial),
        What::Started | What::Ended { .. } => None,
    });
    let newest = newest.max().unwrap_or(0);
    let environment = bed.owner.environment(&seen.environment).await?;
    let frozen = environment.frozen.is_some();
    let applied = seen.run.as_ref().is_some_and(|run| run.state() == RunState::Applied);
    let current = environment.state_serial;
    let kept = current != newest && frozen && !applied && is_quarantined(bed, seen, newest).await?;
    found.unless(current == newest || kept, INVARIANT, || {
        format!("terraform wrote {newest}, current is {current}, and none is kept for a person")
    });
    let errored = ledger.iter().any(|entry| matches!(entry.what, What::Errored { .. }));
    found.unless(!errored || frozen, INVARIANT, || {
        "terraform saved errored.tfstate and the environment is not frozen".to_owned()
    });
    Ok(())
}

async fn is_quarantined(bed: &Bed, seen: &Seen, serial: u64) -> anyhow::Result<bool> {
    let request = v1::ListQuarantinedRequest {
        organization: bed.owner.organization.clone(),
        run_id: seen.run_id.clone(),
        page_size: 200,
        page_token: String::new(),
    };
    let listed = bed.owner.quarantine().list_quarantined(request).await;
    match listed {
        Ok(listed) => Ok(listed.into_inner().quarantined.iter().any(|kept| kept.serial == serial)),
        Err(status) if status.code() == Code::Unimplemented => Ok(true),
        Err(status) => Err(status.into()),
    }
}

/// The end that is recorded is the one that was.
fn result(seen: &Seen, ledger: &[Entry], found: &mut Found) {
    const INVARIANT: &str = "the result is known and true";
    let Some(run) = &seen.run else { return };
    let ended =
        ledger.iter().any(|entry| entry.phase == "apply" && entry.what == What::Ended { code: 0 });
    found.unless(run.state() != RunState::Applied || ended, INVARIANT, || {
        "the run is Applied, and terraform did not end well".to_owned()
    });
    let excused = strikes_supervisors(seen);
    let known = run.state() == RunState::Applied || !ended || excused;
    found.unless(known, INVARIANT, || {
        format!("terraform ended well, and the run is {:?}: {}", run.state(), run.reason)
    });
}

fn success(seen: &Seen, found: &mut Found) {
    let Some(run) = &seen.run else { return };
    let holds = seen.plan.expect == Expect::AnyEnd || run.state() == RunState::Applied;
    found.unless(holds, "terraform never fails because of us", || {
        format!("the run is {:?}: {}", run.state(), run.reason)
    });
}

/// Says whether a supervisor may have died: then how terraform ended is not known.
fn strikes_supervisors(seen: &Seen) -> bool {
    let faults = seen.plan.in_plan.iter().chain(&seen.plan.in_apply);
    faults.into_iter().any(|fault| match &fault.action {
        Action::KillSupervisor => true,
        Action::KillAt { point, .. } => point.starts_with("sup."),
        Action::KillPlane
        | Action::KillAgent
        | Action::KillTerraform
        | Action::PauseAt { .. }
        | Action::Network { .. }
        | Action::NoSpace { .. }
        | Action::Clock { .. }
        | Action::Cancel
        | Action::UpgradeAgent
        | Action::Twin { .. }
        | Action::Aws(_) => false,
    })
}

async fn real_log(bed: &Bed, seen: &Seen, found: &mut Found) -> anyhow::Result<()> {
    const INVARIANT: &str = "the log is what terraform printed";
    let Some(run) = &seen.run else { return Ok(()) };
    let log = bed.owner.log_text(&seen.run_id, Phase::Apply).await?;
    let lines: Vec<&str> =
        log.lines().filter_map(|line| line.split("(local-exec): real line ").nth(1)).collect();
    let expected: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    let whole = lines.iter().map(|line| line.trim()).eq(expected.iter().map(String::as_str));
    let doubled = (1..lines.len()).any(|at| lines[..at].contains(&lines[at]));
    found.unless(!doubled && (whole || run.state() != RunState::Applied), INVARIANT, || {
        format!("its program's lines are {lines:?}")
    });
    let environment = bed.owner.environment(&seen.environment).await?;
    let stored = environment.state_serial > 0 || run.state() != RunState::Applied;
    found.unless(stored, "no state is lost", || "there is none after an apply".to_owned());
    Ok(())
}

/// Nothing is left on the host.
async fn host(bed: &Bed, found: &mut Found) {
    const INVARIANT: &str = "nothing is left on the host";
    let places = bed.job_directories();
    for jobs in &places {
        let kept = jobs.with_file_name("kept");
        found.unless(!kept.exists(), INVARIANT, || format!("{} is there", kept.display()));
    }
    // A supervisor leaves a moment after it has told its end.
    let left = wait_for("supervisors to leave", LEAVING, async || {
        let of = |jobs| processes::supervisors(jobs).len() + processes::terraforms(jobs).len();
        let left: usize = places.iter().map(|jobs| of(jobs)).sum();
        if left == 0 { Ok(()) } else { Err(format!("{left} processes are")) }
    });
    if let Err(error) = left.await {
        found.says(INVARIANT, format!("{error:#}"));
    }
}

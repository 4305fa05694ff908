//! An apply whose runner is gone: marked in time, explained to people, and settled without a
//! second start, whether the runner comes back, comes back too late, or never.

use std::time::{Duration, Instant};

use anyhow::Context;
use latchkey_harness::{LIMIT, Network, Proxy, Stage, StageOptions, reason, wait_for};
use latchkey_proto::v1::{MfaPolicy, Phase, Quarantined, QuarantinedKind, Run, RunState};

use crate::gated::Gated;
use crate::support::options;

/// Seconds.
const TERM: u64 = 2;

/// Far more than a term and what the machine may be busy with.
const MARKED_WITHIN: Duration = Duration::from_secs(TERM + 13);

/// A stage with short leases, its runner behind a network that can be cut.
async fn cuttable() -> anyhow::Result<(Stage, Proxy)> {
    let mut options = StageOptions { runners: vec![], ..options() };
    options.plane.lease_term = Some(TERM);
    let mut stage = Stage::start(options).await?;
    let proxy = Proxy::start(stage.plane.runners_address()).await?;
    let url = format!("https://{}", proxy.address());
    stage.add_runner_with("build-1", |options| options.control_plane = url).await?;
    stage.owner.create_environment("web", MfaPolicy::Never).await?;
    Ok((stage, proxy))
}

async fn lost(stage: &Stage, run_id: &str) -> anyhow::Result<Run> {
    let begin = Instant::now();
    let run = stage.owner.wait_for_state(run_id, RunState::Lost).await?;
    assert!(begin.elapsed() < MARKED_WITHIN, "marked after {:?}", begin.elapsed());
    Ok(run)
}

async fn applied(stage: &Stage, run_id: &str) -> anyhow::Result<Run> {
    let is_applied = |run: &Run| run.state() == RunState::Applied;
    stage.owner.wait_for_run(run_id, "the end that its runner tells", is_applied).await
}

/// Waits until all that a job leaves is in quarantine.
pub(crate) async fn remains(stage: &Stage, run_id: &str) -> anyhow::Result<Vec<Quarantined>> {
    let wanted = [QuarantinedKind::State, QuarantinedKind::Log, QuarantinedKind::Result];
    wait_for("state, log and result in quarantine", LIMIT, async || {
        let found = stage.owner.quarantined(run_id).await.map_err(|status| status.to_string())?;
        let is_there = |kind: &QuarantinedKind| found.iter().any(|one| one.kind() == *kind);
        if wanted.iter().all(is_there) { Ok(found) } else { Err(format!("{found:?}")) }
    })
    .await
}

pub(crate) fn of_kind(
    found: &[Quarantined],
    kind: QuarantinedKind,
) -> anyhow::Result<&Quarantined> {
    found.iter().find(|one| one.kind() == kind).context("it is not in quarantine")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_apply_ends_well_when_its_runner_comes_back() -> anyhow::Result<()> {
    let (stage, proxy) = cuttable().await?;
    let (ada, gated) = (&stage.owner, Gated::new(&stage));
    let id = gated.begin(&stage, "web").await?;
    let id = id.as_str();
    proxy.set(Network::Cut);
    let run = lost(&stage, id).await?;

    // What a person can know, and do.
    assert!(run.reason.contains("silent since"), "{}", run.reason);
    assert!(run.reason.contains(&format!("latchkey discard {id}")), "{}", run.reason);
    let job = run.apply.context("the apply was leased")?;
    assert_eq!((job.runner_name.as_str(), job.epoch, job.quarantined), ("build-1", 1, 0));
    assert!(job.last_heard_time.is_some() && job.end_time.is_none(), "{job:?}");
    let frozen = ada.environment("web").await?.frozen.context("the environment is frozen")?;
    assert_eq!(frozen.run_id, id);
    let refused = ada.unfreeze("web", id).await.unwrap_err();
    assert_eq!(reason(&refused), "WRONG_STATE", "its runner may be applying still: {refused:?}");
    let next = ada.queue("web", &gated.configuration()).await?;
    assert_eq!(next.state(), RunState::Pending);
    assert!(ada.run(&next.run_id).await?.reason.contains("frozen"), "the next run says why");

    // terraform has ended before anybody can be told.
    gated.open()?;
    proxy.set(Network::FINE);
    let run = applied(&stage, id).await?;
    assert_eq!(run.apply.context("the apply was leased")?.epoch, 1);
    assert_eq!(gated.starts(), 1);
    let log = ada.log_text(id, Phase::Apply).await?;
    assert_eq!(log.matches("(local-exec): the gate is open").count(), 1, "{log}");
    assert!(ada.quarantined(id).await?.is_empty());
    let environment = ada.environment("web").await?;
    assert!(environment.frozen.is_none() && environment.state_serial > 0, "{environment:?}");
    // Free again, the environment takes the next, on the state that was brought.
    ada.wait_for_state(&next.run_id, RunState::Planned).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_given_up_apply_made_is_kept_for_a_person_to_accept() -> anyhow::Result<()> {
    let (stage, proxy) = cuttable().await?;
    let (ada, gated) = (&stage.owner, Gated::new(&stage));
    let id = gated.begin(&stage, "web").await?;
    let id = id.as_str();
    proxy.set(Network::Cut);
    lost(&stage, id).await?;
    let given_up = ada.give_up(id).await?;
    assert_eq!(given_up.state(), RunState::Errored);
    assert!(given_up.reason.contains("given up by ada"), "{}", given_up.reason);
    assert!(ada.environment("web").await?.frozen.is_some(), "until a person has looked");

    // The runner comes back too late.
    gated.open()?;
    proxy.set(Network::FINE);
    let found = remains(&stage, id).await?;
    assert!(found.iter().all(|one| one.run_id == id && one.phase() == Phase::Apply), "{found:?}");
    assert!(found.iter().all(|one| one.epoch == 1 && !one.summary.is_empty()), "{found:?}");
    let state = of_kind(&found, QuarantinedKind::State)?;
    assert!(state.summary.contains("no state yet"), "{}", state.summary);
    let result = of_kind(&found, QuarantinedKind::Result)?;
    assert!(!result.summary.contains("not end well"), "{}", result.summary);
    let run = ada.run(id).await?;
    assert_eq!((run.state(), run.reason), (RunState::Errored, given_up.reason));
    assert_eq!(run.apply.context("the apply was leased")?.quarantined as usize, found.len());
    assert_eq!(ada.environment("web").await?.state_serial, 0, "nothing current has changed");

    // A person decides.
    let refused = ada.accept_state("other", &state.quarantined_id).await.unwrap_err();
    assert_eq!(reason(&refused), "FIELD_INVALID");
    let accepted = ada.accept_state("web", &state.quarantined_id).await?;
    assert_eq!((accepted.state_serial, &accepted.state_lineage), (state.serial, &state.lineage));
    let environment = ada.unfreeze("web", id).await?;
    assert!(environment.frozen.is_none());
    assert_eq!(environment.state_serial, state.serial);

    // What was made is known: there is nothing to make again.
    let next = ada.queue("web", &gated.configuration()).await?;
    let next = ada.wait_for_state(&next.run_id, RunState::Planned).await?;
    let plan = next.plan_result.context("the plan has a result")?;
    assert!(!plan.applyable && plan.add == 0, "{plan:?}");
    assert_eq!(gated.starts(), 1);
    assert!(ada.verify_audit().await?.intact);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_died_is_given_up_and_does_not_start_terraform_again() -> anyhow::Result<()> {
    let (mut stage, _proxy) = cuttable().await?;
    let (ada, gated) = (stage.owner.clone(), Gated::new(&stage));
    let id = gated.begin(&stage, "web").await?;
    let id = id.as_str();
    stage.runners[0].lose_host().await?;
    lost(&stage, id).await?;
    ada.give_up(id).await?;

    // The host comes up again, with what was on its disk.
    stage.runners[0].restart()?;
    ada.wait_for_runner("build-1").await?;
    let jobs = stage.runners[0].work_dir().join("jobs");
    wait_for("the dead job to be settled", LIMIT, async || {
        let left = std::fs::read_dir(&jobs).map_err(|error| error.to_string())?.count();
        if left == 0 { Ok(()) } else { Err(format!("{left} directories of jobs")) }
    })
    .await?;
    let found = ada.quarantined(id).await?;
    let result = of_kind(&found, QuarantinedKind::Result)?;
    assert!(!result.summary.is_empty());
    assert_eq!(ada.run(id).await?.state(), RunState::Errored);
    assert_eq!(gated.starts(), 1);

    // No state was brought: the next run starts from what is known.
    ada.unfreeze("web", id).await?;
    gated.open()?;
    let next = ada.queue("web", &gated.configuration()).await?;
    ada.wait_for_state(&next.run_id, RunState::AwaitingConfirmation).await?;
    ada.confirm(&next.run_id).await?;
    ada.wait_for_state(&next.run_id, RunState::Applied).await?;
    Ok(())
}

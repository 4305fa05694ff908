//! Wire to domain and back.

use std::time::Duration;

use latchkey_domain::environment::StateLock;
use latchkey_domain::id::{Digest, Epoch, Generation, JobId};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Authenticated, Counts, Job, Planned, RunKind, RunState};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1;
use serde_json::Value;

use super::settings::{plan_rule_out, settings_out};
use crate::app::PageRequest;
use crate::app::environments::EnvironmentView;
use crate::app::forecast::{CodeFacts, Forecast, TopUp};
use crate::app::quarantine::next_steps;
use crate::app::settings::warnings;
use crate::app::view_runs::{Detail, JobFacts, Lock, RunView};
use crate::error::{Error, Result};
use crate::job::{JobSpec, LeaseRef};

/// The most changes that one answer lists, and the most bytes that they take.
const MOST_CHANGES: usize = 1000;
const CHANGES_SIZE: usize = 2 << 20;

pub(super) fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let millis = time.as_millis();
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

/// Reads a time that may be absent.
pub(super) fn time(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>> {
    time.map(|time| {
        let millis = time.seconds.checked_mul(1000);
        let millis =
            millis.and_then(|millis| millis.checked_add(i64::from(time.nanos) / 1_000_000));
        let millis = millis.ok_or_else(|| Error::field(field, "the time is out of range"))?;
        Ok(Timestamp::from_millis(millis))
    })
    .transpose()
}

/// Reads a duration that may be absent.
pub(super) fn duration(
    field: &'static str,
    duration: Option<prost_types::Duration>,
) -> Result<Option<Duration>> {
    duration
        .map(|duration| {
            Duration::try_from(duration)
                .map_err(|_| Error::field(field, "a duration is not negative"))
        })
        .transpose()
}

pub(super) fn page(size: u32, token: String) -> PageRequest {
    PageRequest { size, token }
}

/// Reads a digest that may be absent: empty text.
pub(super) fn optional_digest(field: &'static str, text: &str) -> Result<Option<Digest>> {
    if text.is_empty() { Ok(None) } else { crate::app::parse_digest(field, text).map(Some) }
}

pub(super) fn phase(value: i32) -> Result<Phase> {
    match v1::Phase::try_from(value) {
        Ok(v1::Phase::Plan) => Ok(Phase::Plan),
        Ok(v1::Phase::Apply) => Ok(Phase::Apply),
        Ok(v1::Phase::Unspecified) | Err(_) => {
            Err(Error::field("phase", "say PHASE_PLAN or PHASE_APPLY"))
        }
    }
}

pub(super) const fn phase_out(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Plan => v1::Phase::Plan,
        Phase::Apply => v1::Phase::Apply,
    }
}

/// Reads a policy; unspecified is absent.
pub(super) fn policy(value: i32) -> Result<Option<MfaPolicy>> {
    match v1::MfaPolicy::try_from(value) {
        Ok(v1::MfaPolicy::Unspecified) => Ok(None),
        Ok(v1::MfaPolicy::Never) => Ok(Some(MfaPolicy::Never)),
        Ok(v1::MfaPolicy::AppliesOnly) => Ok(Some(MfaPolicy::AppliesOnly)),
        Ok(v1::MfaPolicy::PlansAndApplies) => Ok(Some(MfaPolicy::PlansAndApplies)),
        Err(_) => Err(Error::field("mfa_policy", "it is none of the three levels")),
    }
}

pub(super) const fn policy_out(policy: MfaPolicy) -> v1::MfaPolicy {
    match policy {
        MfaPolicy::Never => v1::MfaPolicy::Never,
        MfaPolicy::AppliesOnly => v1::MfaPolicy::AppliesOnly,
        MfaPolicy::PlansAndApplies => v1::MfaPolicy::PlansAndApplies,
    }
}

/// Reads a kind; unspecified means plan and apply.
pub(super) fn kind(value: i32) -> Result<RunKind> {
    match v1::RunKind::try_from(value) {
        Ok(v1::RunKind::Unspecified | v1::RunKind::PlanAndApply) => Ok(RunKind::PlanAndApply),
        Ok(v1::RunKind::PlanOnly) => Ok(RunKind::PlanOnly),
        Ok(v1::RunKind::Destroy) => Ok(RunKind::Destroy),
        Ok(v1::RunKind::RefreshOnly) => Ok(RunKind::RefreshOnly),
        Err(_) => Err(Error::field("kind", "it is none of the kinds of runs")),
    }
}

const fn kind_out(kind: RunKind) -> v1::RunKind {
    match kind {
        RunKind::PlanAndApply => v1::RunKind::PlanAndApply,
        RunKind::PlanOnly => v1::RunKind::PlanOnly,
        RunKind::Destroy => v1::RunKind::Destroy,
        RunKind::RefreshOnly => v1::RunKind::RefreshOnly,
    }
}

const fn state_out(state: RunState) -> v1::RunState {
    match state {
        RunState::AwaitingPlanMfa => v1::RunState::AwaitingPlanMfa,
        RunState::Pending => v1::RunState::Pending,
        RunState::PlanQueued => v1::RunState::PlanQueued,
        RunState::Planning => v1::RunState::Planning,
        RunState::AwaitingConfirmation => v1::RunState::AwaitingConfirmation,
        RunState::AwaitingApplyMfa => v1::RunState::AwaitingApplyMfa,
        RunState::ApplyQueued => v1::RunState::ApplyQueued,
        RunState::Applying => v1::RunState::Applying,
        RunState::Planned => v1::RunState::Planned,
        RunState::Applied => v1::RunState::Applied,
        RunState::Errored => v1::RunState::Errored,
        RunState::Canceled => v1::RunState::Canceled,
        RunState::Discarded => v1::RunState::Discarded,
        RunState::Lost => v1::RunState::Lost,
    }
}

pub(super) fn run(view: RunView) -> v1::Run {
    let RunView { run, organization, environment, lock, queue_position, changes, .. } = &view;
    let request = &run.request;
    v1::Run {
        run_id: run.id.to_string(),
        organization: organization.clone(),
        environment: environment.clone(),
        kind: kind_out(request.kind).into(),
        state: state_out(run.state).into(),
        message: request.message.clone(),
        queued_by: request.queued_by.name().to_owned(),
        create_time: Some(timestamp(request.queued_at)),
        update_time: Some(timestamp(run.updated_at)),
        mfa_policy: policy_out(request.policy).into(),
        auto_apply: request.auto_apply,
        configuration_digest: request.configuration.to_string(),
        lock: match lock {
            Lock::NotRequired => v1::Lock::NotRequired,
            Lock::CodeRequired => v1::Lock::CodeRequired,
            Lock::Authenticated => v1::Lock::Authenticated,
            Lock::Failed => v1::Lock::Failed,
        }
        .into(),
        last_refusal: run.refused_code.as_ref().filter(|_| *lock == Lock::Failed).map(|refused| {
            v1::AuthenticationRefusal {
                reason: refused.reason.clone(),
                message: refused.message.clone(),
                time: Some(timestamp(refused.at)),
                aws_request_id: refused.aws_request_id.clone().unwrap_or_default(),
            }
        }),
        plan: Some(job(
            &run.plan,
            &view.plan_facts,
            view.credentials.of(Phase::Plan),
            view.plan_log_length,
        )),
        apply: Some(v1::JobFacts {
            runner_revoked: run.lost_its_runner(),
            ..job(
                &run.apply,
                &view.apply_facts,
                view.credentials.of(Phase::Apply),
                view.apply_log_length,
            )
        }),
        plan_result: run.planned.as_ref().map(|planned| plan(planned, changes.as_deref())),
        approval: run.approval.as_ref().map(|approval| v1::Approval {
            user: approval.by.clone(),
            approve_time: Some(timestamp(approval.at)),
            plan_digest: approval.digest.to_string(),
        }),
        reason: run.reason.clone().unwrap_or_default(),
        target: request.target.clone(),
        replace: request.replace.clone(),
        outputs_json: run
            .outputs
            .clone()
            .filter(|_| view.detail == Detail::Whole)
            .unwrap_or_default(),
        cancel_requested: run.cancel_requested_by.is_some(),
        queue_position: *queue_position,
        cancel_request_time: run.cancel_requested_at.map(timestamp),
        force_cancel_time: view.force_cancel_time.map(timestamp),
        retry_of: request.retry_of.map(|run| run.to_string()).unwrap_or_default(),
        given_variables: request.given.iter().map(|one| one.name.clone()).collect(),
        apply_forecast: view.credentials.forecast.as_ref().map(forecast),
        warnings: view.credentials.warnings.clone(),
        code_reason: view.code_reason.clone().unwrap_or_default(),
        second_person: request.second_person,
        plan_rule: plan_rule_out(request.plan_rule.clone()),
    }
}

fn forecast(forecast: &Forecast) -> v1::ApplyForecast {
    let duration = |duration: Duration| prost_types::Duration::try_from(duration).ok();
    v1::ApplyForecast {
        duration: forecast.duration.and_then(duration),
        samples: u32::try_from(forecast.samples).unwrap_or(u32::MAX),
        session: forecast.session.and_then(duration),
        warning: forecast.warning.clone().unwrap_or_default(),
    }
}

fn job(job: &Job, facts: &JobFacts, codes: &CodeFacts, log_length: u64) -> v1::JobFacts {
    v1::JobFacts {
        epoch: job.epoch.get(),
        runner_id: job.last_holder().map(|runner| runner.to_string()).unwrap_or_default(),
        queue_time: job.queued_at.map(timestamp),
        start_time: job.started_at.map(timestamp),
        end_time: job.ended_at.map(timestamp),
        authenticated: job.authenticated.as_ref().map(|authenticated| {
            let Authenticated { user, at, expires_at } = authenticated;
            v1::Authenticated {
                user: user.clone(),
                authenticate_time: Some(timestamp(*at)),
                expire_time: Some(timestamp(*expires_at)),
                packed_policy_percent: codes.packed_percent.unwrap_or_default(),
                role_arn: codes.role.clone().unwrap_or_default(),
                top_ups: codes.top_ups.iter().map(top_up).collect(),
            }
        }),
        log_length,
        runner_name: facts.runner_name.clone(),
        last_heard_time: facts.last_heard.map(timestamp),
        quarantined: facts.quarantined,
        runner_revoked: false,
    }
}

fn top_up(top_up: &TopUp) -> v1::Authenticated {
    v1::Authenticated {
        user: top_up.user.clone(),
        authenticate_time: Some(timestamp(top_up.at)),
        expire_time: Some(timestamp(top_up.expires_at)),
        ..v1::Authenticated::default()
    }
}

fn plan(planned: &Planned, changes: Option<&Value>) -> v1::Plan {
    let Counts { add, change, destroy, import, replace } = planned.counts;
    let of = |name: &str| changes.and_then(|changes| changes.get(name)?.as_array());
    // Few, and told first: they are not what a plan is expected to do.
    let lists = [of("action_invocations"), of("resource_changes")];
    let listed: Vec<&Value> = lists.into_iter().flatten().flatten().collect();
    let shown = fitting(&listed);
    v1::Plan {
        add,
        change,
        destroy,
        import,
        replace,
        applyable: planned.applyable,
        digest: planned.digest.to_string(),
        terraform_version: planned.terraform_version.clone(),
        engine: planned.engine.clone(),
        truncated: shown.len() < listed.len(),
        change_list: shown,
    }
}

/// Converts as many changes as fit into an answer.
fn fitting(listed: &[&Value]) -> Vec<v1::ResourceChange> {
    let mut left = CHANGES_SIZE;
    listed
        .iter()
        .take(MOST_CHANGES)
        .map(|change| resource_change(change))
        .take_while(|change| {
            let size = change.address.len() + change.before_json.len() + change.after_json.len();
            match left.checked_sub(size + 64) {
                Some(rest) => {
                    left = rest;
                    true
                }
                None => false,
            }
        })
        .collect()
}

fn resource_change(change: &Value) -> v1::ResourceChange {
    let text = |name: &str| change.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let json = |name: &str| {
        change.get(name).filter(|value| !value.is_null()).map(Value::to_string).unwrap_or_default()
    };
    v1::ResourceChange {
        address: text("address"),
        action: text("action"),
        before_json: json("before"),
        after_json: json("after"),
    }
}

pub(super) fn environment(view: EnvironmentView) -> v1::Environment {
    let EnvironmentView { environment, organization_name, pool_name } = view;
    let frozen = environment
        .hold
        .frozen
        .as_ref()
        .map(|frozen| v1::Frozen { run_id: frozen.run.to_string(), reason: next_steps(frozen) });
    let warnings = warnings(&environment.settings);
    v1::Environment {
        warnings,
        environment_id: environment.id.to_string(),
        organization: organization_name,
        environment: environment.name,
        settings: Some(settings_out(environment.settings, pool_name)),
        create_time: Some(timestamp(environment.created_at)),
        active_run_id: environment.hold.holder.map(|run| run.to_string()).unwrap_or_default(),
        frozen,
        state_lock: environment.hold.state_lock.map(state_lock),
        locked: environment.hold.locked.map(|locked| v1::Locked {
            user: locked.by,
            reason: locked.reason,
            lock_time: Some(timestamp(locked.at)),
        }),
        break_glass: environment.break_glass.map(|broken| v1::BreakGlass {
            reason: broken.reason,
            what: broken.what,
            time: Some(timestamp(broken.at.into())),
        }),
        state_serial: environment.state.as_ref().map_or(0, |state| state.serial),
        state_lineage: environment.state.map(|state| state.lineage).unwrap_or_default(),
    }
}

pub(super) fn state_lock(lock: StateLock) -> v1::StateLock {
    let StateLock { id, user, operation, workstation, info, engine_version, at } = lock;
    v1::StateLock {
        lock_id: id,
        user,
        operation,
        workstation,
        info,
        engine_version,
        create_time: Some(timestamp(at)),
    }
}

pub(super) fn lease(lease: Option<v1::LeaseRef>) -> Result<LeaseRef> {
    let lease = lease.ok_or_else(|| Error::field("lease", "name the lease"))?;
    Ok(LeaseRef {
        job: JobId { run: crate::app::parse_run_id(&lease.run_id)?, phase: phase(lease.phase)? },
        epoch: Epoch::new(lease.epoch),
        generation: Generation::new(lease.generation),
    })
}

pub(super) fn lease_out(lease: LeaseRef) -> v1::LeaseRef {
    v1::LeaseRef {
        run_id: lease.job.run.to_string(),
        phase: phase_out(lease.job.phase).into(),
        epoch: lease.epoch.get(),
        generation: lease.generation.get(),
    }
}

pub(super) fn job_spec(spec: JobSpec) -> v1::JobSpec {
    v1::JobSpec {
        organization: spec.organization,
        environment: spec.environment,
        kind: kind_out(spec.kind).into(),
        archive_digest: spec.archive.to_string(),
        working_directory: spec.working_directory,
        target: spec.target,
        replace: spec.replace,
        has_state: spec.has_state,
        terraform_version: spec.terraform_version,
        approved: spec.approved.map(|digests| v1::ApprovedPlan {
            plan_digest: digests.plan.to_string(),
            workspace_digest: digests.workspace.to_string(),
            lock_file_digest: digests.lock_file.map(|d| d.to_string()).unwrap_or_default(),
            changes_digest: digests.changes.to_string(),
        }),
        queued_by: spec.queued_by,
        message: spec.message,
        region: spec.region,
        engine: spec.engine,
    }
}

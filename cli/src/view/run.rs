//! A run, as programs and people see it.

use serde::Serialize;
use serde_json::Value;

use latchkey_proto::v1;
use latchkey_proto::v1::{Lock, Phase, RunState};

use crate::output::{fields, table};
use crate::view::environment::PlanRuleView;
use crate::words::{Word, explain, human_duration, human_time, time};

/// Changes shown to people before the rest is only counted.
const SHOWN_CHANGES: usize = 100;

#[derive(Debug, Serialize)]
pub(crate) struct RunView {
    pub(crate) run_id: String,
    organization: String,
    environment: String,
    kind: String,
    state: String,
    reason: Option<String>,
    message: Option<String>,
    queued_by: String,
    create_time: Option<String>,
    update_time: Option<String>,
    mfa_policy: String,
    auto_apply: bool,
    configuration_digest: String,
    target: Vec<String>,
    replace: Vec<String>,
    lock: String,
    last_refusal: Option<RefusalView>,
    plan: Option<JobView>,
    apply: Option<JobView>,
    plan_result: Option<PlanView>,
    approval: Option<ApprovalView>,
    outputs: Value,
    cancel_requested: bool,
    cancel_request_time: Option<String>,
    force_cancel_time: Option<String>,
    queue_position: Option<u32>,
    code_reason: Option<String>,
    second_person: bool,
    plan_rule: Option<PlanRuleView>,
    apply_forecast: Option<ForecastView>,
    warnings: Vec<String>,
    retry_of: Option<String>,
    given_variables: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RefusalView {
    reason: String,
    message: String,
    time: Option<String>,
    aws_request_id: Option<String>,
}

#[derive(Debug, Serialize)]
struct JobView {
    epoch: u64,
    runner_id: Option<String>,
    runner_name: Option<String>,
    last_heard_time: Option<String>,
    queue_time: Option<String>,
    start_time: Option<String>,
    end_time: Option<String>,
    authenticated: Option<AuthenticatedView>,
    log_length: u64,
    quarantined: u32,
}

#[derive(Debug, Serialize)]
struct AuthenticatedView {
    user: String,
    authenticate_time: Option<String>,
    expire_time: Option<String>,
    packed_policy_percent: Option<u32>,
    role_arn: Option<String>,
    top_ups: Vec<AuthenticatedView>,
}

impl AuthenticatedView {
    fn new(authenticated: &v1::Authenticated) -> AuthenticatedView {
        AuthenticatedView {
            user: authenticated.user.clone(),
            authenticate_time: time(authenticated.authenticate_time.as_ref()),
            expire_time: time(authenticated.expire_time.as_ref()),
            packed_policy_percent: Some(authenticated.packed_policy_percent).filter(|p| *p > 0),
            role_arn: some(&authenticated.role_arn),
            top_ups: authenticated.top_ups.iter().map(AuthenticatedView::new).collect(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ForecastView {
    duration_seconds: Option<i64>,
    samples: u32,
    session_seconds: Option<i64>,
    warning: Option<String>,
}

impl ForecastView {
    fn new(forecast: &v1::ApplyForecast) -> ForecastView {
        ForecastView {
            duration_seconds: forecast.duration.map(|duration| duration.seconds),
            samples: forecast.samples,
            session_seconds: forecast.session.map(|session| session.seconds),
            warning: some(&forecast.warning),
        }
    }
}

#[derive(Debug, Serialize)]
struct PlanView {
    add: u32,
    change: u32,
    destroy: u32,
    import: u32,
    replace: u32,
    applyable: bool,
    digest: String,
    terraform_version: String,
    changes: Vec<ChangeView>,
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct ChangeView {
    address: String,
    action: String,
    before: Value,
    after: Value,
}

#[derive(Debug, Serialize)]
struct ApprovalView {
    user: String,
    approve_time: Option<String>,
    plan_digest: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct RunListView {
    pub(crate) runs: Vec<RunView>,
}

impl RunView {
    pub(crate) fn new(run: &v1::Run) -> RunView {
        RunView {
            run_id: run.run_id.clone(),
            organization: run.organization.clone(),
            environment: run.environment.clone(),
            kind: run.kind().snake(),
            state: run.state().snake(),
            reason: some(&run.reason),
            message: some(&run.message),
            queued_by: run.queued_by.clone(),
            create_time: time(run.create_time.as_ref()),
            update_time: time(run.update_time.as_ref()),
            mfa_policy: run.mfa_policy().snake(),
            auto_apply: run.auto_apply,
            configuration_digest: run.configuration_digest.clone(),
            target: run.target.clone(),
            replace: run.replace.clone(),
            lock: run.lock().snake(),
            last_refusal: run.last_refusal.as_ref().map(|refusal| RefusalView {
                reason: refusal.reason.to_lowercase(),
                message: refusal.message.clone(),
                time: time(refusal.time.as_ref()),
                aws_request_id: some(&refusal.aws_request_id),
            }),
            plan: run.plan.as_ref().map(JobView::new),
            apply: run.apply.as_ref().map(JobView::new),
            plan_result: run.plan_result.as_ref().map(PlanView::new),
            approval: run.approval.as_ref().map(|approval| ApprovalView {
                user: approval.user.clone(),
                approve_time: time(approval.approve_time.as_ref()),
                plan_digest: approval.plan_digest.clone(),
            }),
            outputs: json(&run.outputs_json),
            cancel_requested: run.cancel_requested,
            cancel_request_time: time(run.cancel_request_time.as_ref()),
            force_cancel_time: time(run.force_cancel_time.as_ref()),
            queue_position: Some(run.queue_position).filter(|position| *position > 0),
            code_reason: some(&run.code_reason),
            second_person: run.second_person,
            plan_rule: run.plan_rule.clone().map(PlanRuleView::new),
            apply_forecast: run.apply_forecast.as_ref().map(ForecastView::new),
            warnings: run.warnings.clone(),
            retry_of: some(&run.retry_of),
            given_variables: run.given_variables.clone(),
        }
    }
}

impl JobView {
    fn new(job: &v1::JobFacts) -> JobView {
        JobView {
            epoch: job.epoch,
            runner_id: some(&job.runner_id),
            runner_name: some(&job.runner_name),
            last_heard_time: time(job.last_heard_time.as_ref()),
            queue_time: time(job.queue_time.as_ref()),
            start_time: time(job.start_time.as_ref()),
            end_time: time(job.end_time.as_ref()),
            authenticated: job.authenticated.as_ref().map(AuthenticatedView::new),
            log_length: job.log_length,
            quarantined: job.quarantined,
        }
    }
}

impl PlanView {
    fn new(plan: &v1::Plan) -> PlanView {
        PlanView {
            add: plan.add,
            change: plan.change,
            destroy: plan.destroy,
            import: plan.import,
            replace: plan.replace,
            applyable: plan.applyable,
            digest: plan.digest.clone(),
            terraform_version: plan.terraform_version.clone(),
            changes: plan
                .change_list
                .iter()
                .map(|change| ChangeView {
                    address: change.address.clone(),
                    action: change.action.clone(),
                    before: json(&change.before_json),
                    after: json(&change.after_json),
                })
                .collect(),
            truncated: plan.truncated,
        }
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or(Value::Null)
}

/// Writes a run in full for people.
pub(crate) fn show(run: &v1::Run) -> String {
    let state = format!("{}: {}", run.state().camel(), explain(run.state()));
    let position = match run.queue_position {
        0 => String::new(),
        position => format!("{position} in line"),
    };
    let refusal = run.last_refusal.as_ref().filter(|_| run.lock() == Lock::Failed);
    let mut text = format!("Run {} in {}/{}\n", run.run_id, run.organization, run.environment);
    text.push_str(&fields(&[
        ("state", state),
        ("reason", run.reason.clone()),
        ("lock", lock(run)),
        ("refused", refusal.map(|refusal| refusal.message.clone()).unwrap_or_default()),
        ("turn", position),
        ("kind", run.kind().spaced()),
        ("message", run.message.clone()),
        ("retry of", run.retry_of.clone()),
        ("queued", format!("by {} at {}", run.queued_by, human_time(run.create_time.as_ref()))),
        ("code", code_reason(run)),
        ("policy", policy(run)),
        ("target", run.target.join(", ")),
        ("replace", run.replace.join(", ")),
        ("given", run.given_variables.join(", ")),
        ("plan", job(run, Phase::Plan)),
        ("apply", job(run, Phase::Apply)),
        ("approved", approval(run)),
        ("stopping", stopping(run)),
        ("quarantine", quarantine(run)),
    ]));
    let authenticated = authenticated(run);
    if !authenticated.is_empty() {
        text.push_str(&format!("\n{}\n", authenticated.join("\n")));
    }
    if let Some(plan) = &run.plan_result {
        text.push('\n');
        text.push_str(&changes(plan));
    }
    for line in before_apply(run) {
        text.push_str(&format!("{line}\n"));
    }
    let outputs = outputs(run);
    if !outputs.is_empty() {
        text.push('\n');
        text.push_str(&outputs);
    }
    if let Some(next) = next_step(run) {
        text.push_str(&format!("\nnext: {next}\n"));
    }
    crate::log_view::clean(&text)
}

/// Says why a plan rule demands a code; nothing where the reason says it already.
pub(crate) fn code_reason(run: &v1::Run) -> String {
    if run.code_reason == run.reason { String::new() } else { run.code_reason.clone() }
}

/// Says how the lock stands, by shape and words.
pub(crate) fn lock(run: &v1::Run) -> String {
    match run.lock() {
        Lock::Unspecified => String::new(),
        Lock::NotRequired => "[ ] open: no code is required".to_owned(),
        Lock::CodeRequired => "[?] waiting: a token code is required".to_owned(),
        Lock::Authenticated => "[+] authenticated".to_owned(),
        Lock::Failed => "[x] failed: the last code was refused; the run still waits".to_owned(),
    }
}

/// Says how many things a plan changes.
pub(crate) fn counts(plan: &v1::Plan) -> String {
    if !plan.applyable {
        return "Plan: no changes".to_owned();
    }
    let import = match plan.import {
        0 => String::new(),
        import => format!("{import} to import, "),
    };
    let replace = match plan.replace {
        0 => String::new(),
        replace => format!(" ({replace} replaced)"),
    };
    format!(
        "Plan: {import}{} to add, {} to change, {} to destroy{replace}",
        plan.add, plan.change, plan.destroy
    )
}

/// Lists what a plan changes, the counts last.
pub(crate) fn changes(plan: &v1::Plan) -> String {
    let shown: Vec<_> = plan.change_list.iter().filter(|change| change.action != "no-op").collect();
    let mut text = String::new();
    for change in shown.iter().take(SHOWN_CHANGES) {
        let sign = match change.action.as_str() {
            "create" => "+",
            "delete" => "-",
            "replace" => "-/+",
            "update" => "~",
            "read" => "<=",
            _ => ".",
        };
        text.push_str(&format!("  {sign:>3} {:<8} {}\n", change.action, change.address));
    }
    if shown.len() > SHOWN_CHANGES || plan.truncated {
        text.push_str("      ... and more\n");
    }
    text.push_str(&counts(plan));
    text.push('\n');
    crate::log_view::clean(&text)
}

/// Says what a person should know before they let the run apply; nothing when there is nothing.
pub(crate) fn before_apply(run: &v1::Run) -> Vec<String> {
    let mut lines = vec![];
    if let Some(forecast) = &run.apply_forecast {
        let life = forecast.session.map(|session| human_duration(session.seconds));
        let taken = forecast.duration.map(|duration| human_duration(duration.seconds.max(1)));
        match (taken, life) {
            (Some(taken), Some(life)) => lines.push(format!(
                "forecast: applies here took up to {taken} (95th percentile of {}); the session \
                 lives {life}",
                forecast.samples
            )),
            (Some(taken), None) => lines.push(format!(
                "forecast: applies here took up to {taken} (95th percentile of {})",
                forecast.samples
            )),
            (None, _) => {}
        }
        if !forecast.warning.is_empty() {
            lines.push(format!("WARNING: {}", forecast.warning));
        }
    }
    lines.extend(run.warnings.iter().map(|warning| format!("WARNING: {warning}")));
    lines.iter().map(|line| crate::log_view::clean(line)).collect()
}

/// Names whose codes were accepted, one line each.
pub(crate) fn authenticated(run: &v1::Run) -> Vec<String> {
    let mut lines = vec![];
    for (phase, job) in [(Phase::Plan, &run.plan), (Phase::Apply, &run.apply)] {
        let Some(authenticated) = job.as_ref().and_then(|job| job.authenticated.as_ref()) else {
            continue;
        };
        lines.push(authenticated_by("Authenticated", phase, authenticated));
        let top_ups = authenticated.top_ups.iter();
        lines.extend(top_ups.map(|top_up| authenticated_by("Topped up", phase, top_up)));
    }
    lines
}

fn authenticated_by(what: &str, phase: Phase, by: &v1::Authenticated) -> String {
    let at = human_time(by.authenticate_time.as_ref());
    let at = if at.is_empty() { at } else { format!(", {at}") };
    crate::log_view::clean(&format!("{what} with MFA by {} ({}{at})", by.user, phase.snake()))
}

/// Writes terraform's outputs; empty when there is none.
pub(crate) fn outputs(run: &v1::Run) -> String {
    let Value::Object(outputs) = json(&run.outputs_json) else { return String::new() };
    if outputs.is_empty() {
        return String::new();
    }
    let width = outputs.keys().map(String::len).max().unwrap_or(0);
    let mut text = "Outputs:\n".to_owned();
    for (name, output) in &outputs {
        let sensitive = output.get("sensitive").and_then(Value::as_bool).unwrap_or(false);
        let value = match output.get("value") {
            _ if sensitive => "(sensitive)".to_owned(),
            Some(value) => value.to_string(),
            None => "(unknown)".to_owned(),
        };
        text.push_str(&format!("  {name:width$} = {value}\n"));
    }
    crate::log_view::clean(&text)
}

/// Names the command that brings a waiting run on.
pub(crate) fn next_step(run: &v1::Run) -> Option<String> {
    let id = &run.run_id;
    match run.state() {
        RunState::AwaitingPlanMfa => Some(format!("latchkey authenticate {id}")),
        RunState::AwaitingApplyMfa => {
            Some(format!("latchkey authenticate {id}, or latchkey discard {id}"))
        }
        // The policy has become stricter since.
        RunState::AwaitingConfirmation
            if matches!(run.lock(), Lock::CodeRequired | Lock::Failed) =>
        {
            Some(format!("latchkey authenticate {id}, or latchkey discard {id}"))
        }
        RunState::AwaitingConfirmation => {
            Some(format!("latchkey confirm {id}, or latchkey discard {id}"))
        }
        RunState::Errored => Some(format!("latchkey logs {id}")),
        RunState::Lost if runner_was_revoked(run) => Some(format!(
            "its runner was revoked and brings nothing more: find out what the apply did (latchkey \
             quarantine list --run {id}), then latchkey discard {id} to give it up, and latchkey \
             quarantine accept --run {id} to take the state that it left, or drop --run {id}",
        )),
        RunState::Lost => Some(format!(
            "wait for its runner, or latchkey quarantine list --run {id} and accept a state, or \
             latchkey discard {id} to give it up"
        )),
        RunState::Unspecified
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Planned
        | RunState::Applied
        | RunState::Canceled
        | RunState::Discarded => None,
    }
}

/// Tells whether nobody can say any more how the apply ended.
fn runner_was_revoked(run: &v1::Run) -> bool {
    run.apply.as_ref().is_some_and(|facts| facts.runner_revoked)
}

/// Says from when on a run that was asked to stop can be killed, and how.
pub(crate) fn force_hint(run: &v1::Run) -> Option<String> {
    let from = run.force_cancel_time.as_ref()?;
    Some(format!(
        "from {} on, an owner can kill it: latchkey cancel {} --force",
        human_time(Some(from)),
        run.run_id
    ))
}

fn stopping(run: &v1::Run) -> String {
    let Some(asked) = &run.cancel_request_time else { return String::new() };
    let mut text = format!("asked for at {}", human_time(Some(asked)));
    if let Some(hint) = force_hint(run) {
        text.push_str(&format!("; {hint}"));
    }
    text
}

fn quarantine(run: &v1::Run) -> String {
    let of = |facts: &Option<v1::JobFacts>| facts.as_ref().map_or(0, |facts| facts.quarantined);
    let things = match of(&run.plan) + of(&run.apply) {
        0 => return String::new(),
        1 => "1 thing".to_owned(),
        count => format!("{count} things"),
    };
    format!("{things}: latchkey quarantine list --run {}", run.run_id)
}

/// Writes runs under each other.
pub(crate) fn list(runs: &RunListView) -> String {
    let rows = runs
        .runs
        .iter()
        .map(|run| {
            vec![
                run.run_id.clone(),
                run.state.clone(),
                run.kind.clone(),
                run.queued_by.clone(),
                run.create_time.clone().unwrap_or_default(),
                run.message.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(&["RUN", "STATE", "KIND", "QUEUED BY", "QUEUED AT", "MESSAGE"], rows, "no runs yet")
}

fn policy(run: &v1::Run) -> String {
    let auto = if run.auto_apply { "; applies by itself" } else { "" };
    let second = if run.second_person { "; another than who queued approves" } else { "" };
    let rule = run.plan_rule.clone().map(|rule| format!("; {}", PlanRuleView::new(rule).human()));
    format!("{}{}{second}{auto}", run.mfa_policy().spaced(), rule.unwrap_or_default())
}

fn job(run: &v1::Run, phase: Phase) -> String {
    let facts = match phase {
        Phase::Plan => &run.plan,
        Phase::Apply => &run.apply,
        Phase::Unspecified => return String::new(),
    };
    let Some(facts) = facts.as_ref().filter(|facts| facts.epoch > 0) else {
        return String::new();
    };
    let mut text = match facts.runner_name.as_str() {
        "" => format!("on runner {}", facts.runner_id),
        name => format!("on runner {name} ({})", facts.runner_id),
    };
    for (word, time) in [(" from", &facts.start_time), (" to", &facts.end_time)] {
        if time.is_some() {
            text.push_str(&format!("{word} {}", human_time(time.as_ref())));
        }
    }
    if facts.last_heard_time.is_some() {
        text.push_str(&format!(", last heard {}", human_time(facts.last_heard_time.as_ref())));
    }
    text
}

fn approval(run: &v1::Run) -> String {
    run.approval.as_ref().map_or_else(String::new, |approval| {
        format!("by {} at {}", approval.user, human_time(approval.approve_time.as_ref()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds: 1_767_225_600 + seconds, nanos: 0 })
    }

    fn sample() -> v1::Run {
        v1::Run {
            run_id: "0199-run".into(),
            organization: "acme".into(),
            environment: "prod".into(),
            kind: v1::RunKind::PlanAndApply.into(),
            state: RunState::AwaitingApplyMfa.into(),
            message: "add\u{1b}[2J a queue".into(),
            queued_by: "alice".into(),
            create_time: at(0),
            update_time: at(90),
            mfa_policy: v1::MfaPolicy::PlansAndApplies.into(),
            lock: Lock::Failed.into(),
            last_refusal: Some(v1::AuthenticationRefusal {
                reason: "CODE_REJECTED".into(),
                message: "AWS did not accept the code".into(),
                time: at(89),
                aws_request_id: "req-1".into(),
            }),
            plan: Some(v1::JobFacts {
                epoch: 1,
                runner_id: "runner-1".into(),
                start_time: at(10),
                end_time: at(20),
                authenticated: Some(v1::Authenticated {
                    user: "alice".into(),
                    authenticate_time: at(5),
                    expire_time: at(3605),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            plan_result: Some(v1::Plan {
                add: 1,
                destroy: 1,
                applyable: true,
                digest: "d1".into(),
                terraform_version: "1.13.0".into(),
                change_list: vec![
                    v1::ResourceChange {
                        address: "terraform_data.new".into(),
                        action: "create".into(),
                        before_json: "null".into(),
                        after_json: r#"{"input":"x"}"#.into(),
                    },
                    v1::ResourceChange {
                        address: "terraform_data.old".into(),
                        action: "delete".into(),
                        ..Default::default()
                    },
                ],
                ..Default::default()
            }),
            outputs_json: r#"{"name":{"sensitive":false,"type":"string","value":"x"},
                "key":{"sensitive":true,"type":"string"}}"#
                .into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_run_is_shown_with_its_lock_and_the_next_step() {
        let expect = "\
Run 0199-run in acme/prod
  state    AwaitingApplyMfa: the plan waits for a token code, which also confirms it
  lock     [x] failed: the last code was refused; the run still waits
  refused  AWS did not accept the code
  kind     plan and apply
  message  add a queue
  queued   by alice at 2026-01-01 00:00:00 UTC
  policy   plans and applies
  plan     on runner runner-1 from 2026-01-01 00:00:10 UTC to 2026-01-01 00:00:20 UTC

Authenticated with MFA by alice (plan, 2026-01-01 00:00:05 UTC)

    + create   terraform_data.new
    - delete   terraform_data.old
Plan: 1 to add, 0 to change, 1 to destroy

Outputs:
  key  = (sensitive)
  name = \"x\"

next: latchkey authenticate 0199-run, or latchkey discard 0199-run
";
        assert_eq!(show(&sample()), expect);
    }

    #[test]
    fn a_lost_apply_is_shown_with_what_is_known_and_what_can_be_done() {
        let run = v1::Run {
            state: RunState::Lost.into(),
            apply: Some(v1::JobFacts {
                epoch: 1,
                runner_id: "runner-1".into(),
                runner_name: "builder".into(),
                start_time: at(30),
                last_heard_time: at(60),
                quarantined: 2,
                ..Default::default()
            }),
            cancel_request_time: at(40),
            force_cancel_time: at(70),
            ..sample()
        };
        let text = show(&run);
        for line in [
            "apply       on runner builder (runner-1) from 2026-01-01 00:00:30 UTC, last heard \
             2026-01-01 00:01:00 UTC\n",
            "stopping    asked for at 2026-01-01 00:00:40 UTC; from 2026-01-01 00:01:10 UTC on, an \
             owner can kill it: latchkey cancel 0199-run --force\n",
            "quarantine  2 things: latchkey quarantine list --run 0199-run\n",
            "latchkey discard 0199-run to give it up\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        let json = serde_json::to_value(RunView::new(&run)).unwrap();
        assert_eq!(json["apply"]["last_heard_time"], "2026-01-01T00:01:00Z");
        assert_eq!(json["force_cancel_time"], "2026-01-01T00:01:10Z");
    }

    #[test]
    fn a_lost_apply_whose_runner_is_revoked_is_not_waited_for() {
        let with = |runner_revoked| v1::Run {
            state: RunState::Lost.into(),
            apply: Some(v1::JobFacts { epoch: 1, runner_revoked, ..Default::default() }),
            ..sample()
        };
        assert!(next_step(&with(false)).unwrap().starts_with("wait for its runner, or"));
        let next = next_step(&with(true)).unwrap();
        assert!(!next.contains("wait"), "{next}");
        for step in [
            "its runner was revoked",
            "latchkey quarantine list --run 0199-run",
            "latchkey discard 0199-run",
            "latchkey quarantine accept --run 0199-run",
        ] {
            assert!(next.contains(step), "{step}\n{next}");
        }
    }

    #[test]
    fn what_an_apply_may_run_into_is_shown_before_the_next_step() {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let run = v1::Run {
            apply_forecast: Some(v1::ApplyForecast {
                duration: seconds(4000),
                samples: 12,
                session: seconds(3600),
                warning: "it may outlive it".into(),
            }),
            warnings: vec!["provider aws.far assumes a role for 2 h".into()],
            ..sample()
        };
        let text = show(&run);
        let found = |line: &str| text.find(line).unwrap_or_else(|| panic!("{line}\n{text}"));
        let places = [
            "forecast: applies here took up to 1h 6m 40s (95th percentile of 12); the session lives \
             1h\n",
            "WARNING: it may outlive it\n",
            "WARNING: provider aws.far assumes a role for 2 h\n",
            "next: latchkey authenticate 0199-run",
        ]
        .map(found);
        assert!(places.is_sorted(), "{text}");
        let json = serde_json::to_value(RunView::new(&run)).unwrap();
        assert_eq!(json["apply_forecast"]["warning"], "it may outlive it");
        assert_eq!(json["warnings"][0], "provider aws.far assumes a role for 2 h");
    }

    #[test]
    fn programs_get_stable_names() {
        let json = serde_json::to_value(RunView::new(&sample())).unwrap();
        assert_eq!(json["state"], "awaiting_apply_mfa");
        assert_eq!(json["lock"], "failed");
        assert_eq!(json["last_refusal"]["reason"], "code_rejected");
        assert_eq!(json["plan"]["authenticated"]["user"], "alice");
        assert_eq!(json["plan_result"]["changes"][0]["after"]["input"], "x");
        assert_eq!(json["outputs"]["name"]["value"], "x");
        assert_eq!(json["apply"], Value::Null);
        assert_eq!(json["reason"], Value::Null);
        assert_eq!(json["create_time"], "2026-01-01T00:00:00Z");
    }
}

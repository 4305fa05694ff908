//! What a person should know of a run's credentials before they let it apply: how long applies of
//! this environment take and how long a session would live, what AWS said of the session's
//! policies, and whether the configuration asks for what AWS refuses.
//!
//! The durations of the last applies are one small record per environment, written in the commit
//! that ends an apply, so that nothing but that record is read when a run is shown.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{EnvironmentId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_domain::time::Timestamp;
use serde_json::Value;

use super::App;
use super::credentials::{PACKED_WARNING, life};
use super::settings::{LONGEST_FLOOR, TIME_TO_START};
use super::transition::{Advance, Decision, Guard};
use crate::auth::RunnerIdentity;
use crate::error::Result;
use crate::store::record::authentication::{Authentication, Outcome, Purpose};
use crate::store::record::environment::{
    ApplyDurations, CodeCredentials, PlainCredentials, Settings,
};
use crate::store::record::{Loaded, decode, encode};
use crate::store::{Batch, Expect, keys};
use crate::sts::errors::in_words;

/// How many applies a forecast looks back at.
const REMEMBERED: usize = 50;

/// The most that AWS lets a role live that is assumed with temporary credentials.
const CHAIN_LIMIT: Duration = Duration::from_secs(3600);

/// What is known of a run's credentials; only where one run is shown.
#[derive(Clone, Debug, Default)]
pub struct CredentialFacts {
    pub forecast: Option<Forecast>,
    pub warnings: Vec<String>,
    pub plan: CodeFacts,
    pub apply: CodeFacts,
}

impl CredentialFacts {
    pub fn of(&self, phase: Phase) -> &CodeFacts {
        match phase {
            Phase::Plan => &self.plan,
            Phase::Apply => &self.apply,
        }
    }
}

/// What is known of the codes of one phase.
#[derive(Clone, Debug, Default)]
pub struct CodeFacts {
    pub packed_percent: Option<u32>,
    pub role: Option<String>,
    pub top_ups: Vec<TopUp>,
}

#[derive(Clone, Debug)]
pub struct TopUp {
    pub user: String,
    pub at: Timestamp,
    pub expires_at: Timestamp,
}

/// How long the apply may take, and how long what it gets would live and must live at least.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// 95th percentile; absent without any.
    pub duration: Option<Duration>,
    pub samples: usize,
    /// Absent when it gets nothing, or nothing that ends.
    pub session: Option<Duration>,
    pub warning: Option<String>,
}

impl App {
    /// Ends an apply, and remembers how long it took in the same commit.
    pub(super) async fn end_apply(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        id: RunId,
        action: &str,
        event: Event,
    ) -> Result<Advance> {
        let run = self.run(id).await?.value;
        let key = keys::apply_durations(run.request.environment);
        let known = self.apply_durations(run.request.environment).await?;
        let (guard, actor) = (Guard::Identity(runner.id), runner.audit_name());
        self.advance_guarded(id, guard, (&actor, action), |subject| {
            let mut batch = Batch::new();
            if let Some(started_at) = subject.run.value.apply.started_at {
                let mut next = known.clone();
                next.seconds.push(self.now().since(started_at).as_secs());
                let surplus = next.seconds.len().saturating_sub(REMEMBERED);
                next.seconds.drain(..surplus);
                // One run at a time applies here. If two did, a duration would be forgotten.
                batch = batch.put(key.clone(), Expect::Anything, encode(&next));
            }
            Ok(Decision { event: event.clone(), batch, details: vec![] })
        })
        .await
    }

    async fn apply_durations(&self, environment: EnvironmentId) -> Result<ApplyDurations> {
        let found: Option<Loaded<ApplyDurations>> =
            self.fetch(keys::apply_durations(environment)).await?;
        Ok(found.map(|found| found.value).unwrap_or_default())
    }

    /// Answers what is known without the plan's changes.
    pub(super) async fn credential_facts(&self, run: &Run) -> Result<CredentialFacts> {
        let mut facts = CredentialFacts::default();
        for (key, found) in self.list(keys::authentications_of(run.id)).await? {
            let known: Authentication = decode(&key, &found)?;
            let Outcome::Accepted { expires_at, at, .. } = known.outcome else { continue };
            let phase = match known.phase {
                Phase::Plan => &mut facts.plan,
                Phase::Apply => &mut facts.apply,
            };
            phase.packed_percent = known.packed_percent;
            phase.role = known.role;
            match known.purpose {
                Purpose::Phase => phase.top_ups.clear(),
                Purpose::TopUp => phase.top_ups.push(TopUp {
                    user: known.user,
                    at: at.into(),
                    expires_at: expires_at.into(),
                }),
            }
        }
        for phase in Phase::ALL {
            let percent = facts.of(phase).packed_percent;
            if let Some(percent) = percent.filter(|percent| *percent > PACKED_WARNING) {
                facts.warnings.push(format!(
                    "the session policies and tags of the {phase}'s role take {percent} % of the \
                     space that AWS has for them; a little more and it refuses them"
                ));
            }
        }
        if matches!(run.state, RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa) {
            let environment = run.request.environment;
            let settings =
                self.environment(run.request.organization, environment).await?.value.settings;
            let by_code = run.requires_code(Phase::Apply, &settings.demands());
            let durations = self.apply_durations(environment).await?;
            let life = life(&settings, by_code);
            let forecast = forecast(&durations.seconds, life, self.floor(&settings), by_code);
            facts.forecast = Some(forecast);
        }
        Ok(facts)
    }

    /// Says what the plan's own provider configuration asks for that AWS will refuse.
    pub(super) async fn chaining_warnings(
        &self,
        run: &Run,
        changes: &Value,
    ) -> Result<Vec<String>> {
        if run.state.is_end() || run.apply.started_at.is_some() {
            return Ok(vec![]);
        }
        let long = long_roles(changes);
        if long.is_empty() {
            return Ok(vec![]);
        }
        let request = &run.request;
        let environment = self.environment(request.organization, request.environment).await?;
        let settings = &environment.value.settings;
        let by_code = run.requires_code(Phase::Apply, &settings.demands());
        if !is_temporary(settings, by_code) {
            return Ok(vec![]);
        }
        Ok(long.into_iter().map(|(provider, asked)| chained(&provider, asked)).collect())
    }
}

/// Tells whether what the apply gets makes every further role a chained one.
fn is_temporary(settings: &Settings, by_code: bool) -> bool {
    match (by_code, settings.code_credentials, settings.plain_credentials) {
        (true, CodeCredentials::Session | CodeCredentials::Role, _)
        | (false, _, PlainCredentials::Session | PlainCredentials::Role) => true,
        (false, _, PlainCredentials::None | PlainCredentials::Static) => false,
    }
}

/// Reads which providers assume a role for longer than AWS allows, as the runner reduced it.
fn long_roles(changes: &Value) -> Vec<(String, Duration)> {
    let listed = changes.get("assumed_roles").and_then(Value::as_array);
    let read = |entry: &Value| {
        let provider: String =
            entry.get("provider")?.as_str()?.chars().filter(|c| !c.is_control()).take(64).collect();
        let asked = Duration::from_secs(entry.get("seconds")?.as_u64()?);
        (asked > CHAIN_LIMIT).then_some((provider, asked))
    };
    listed.into_iter().flatten().take(16).filter_map(read).collect()
}

fn chained(provider: &str, asked: Duration) -> String {
    format!(
        "provider {provider} assumes a role for {}, and AWS allows 1 h to a role that is assumed \
         with temporary credentials, which is what this apply gets: it would fail. Take `duration` \
         out of its `assume_role`: the provider then renews the role by itself for as long as the \
         session lives",
        in_words(asked)
    )
}

fn forecast(
    seconds: &[u64],
    session: Option<Duration>,
    floor: Duration,
    by_code: bool,
) -> Forecast {
    let duration = percentile_95(seconds).map(Duration::from_secs);
    let samples = seconds.len();
    let warning = match (duration, session) {
        (Some(duration), Some(session)) if duration > session => {
            let (bought, remedy) = if by_code {
                (
                    "the session that a code buys",
                    "Lengthen it with `latchkey env set --session-duration`, or be there to submit \
                     another code while it applies (`latchkey top-up`)",
                )
            } else {
                (
                    "the session that this apply gets",
                    "Lengthen it with `latchkey env set --session-duration`",
                )
            };
            Some(format!(
                "applies of this environment have taken up to {} (95th percentile of {samples}), and \
                 {bought} lives {}. {remedy}",
                in_words(duration),
                in_words(session)
            ))
        }
        // Only what a code buys may have waited, and have no more than the floor left.
        (Some(duration), Some(session)) if by_code && floor < highest_floor(duration, session) => {
            Some(format!(
                "applies of this environment have taken up to {} (95th percentile of {samples}), and \
                 one may start when no more than {} is left of its session: if it has to wait, it \
                 may outlive it. Have another code asked for then with `latchkey env set \
                 --session-floor {}`",
                in_words(duration),
                in_words(floor),
                flag(highest_floor(duration, session), session.saturating_sub(TIME_TO_START))
            ))
        }
        (_, _) => None,
    };
    Forecast { duration, samples, session, warning }
}

/// The floor for applies that take so long, as far as settings admit one.
fn highest_floor(duration: Duration, session: Duration) -> Duration {
    duration.min(LONGEST_FLOOR).min(session.saturating_sub(TIME_TO_START))
}

/// Writes a floor as the command line takes it: in whole minutes, where the limit has as many.
fn flag(floor: Duration, limit: Duration) -> String {
    let minutes = floor.as_secs().div_ceil(60);
    if minutes * 60 <= limit.as_secs() {
        format!("{minutes}m")
    } else {
        format!("{}s", floor.as_secs())
    }
}

/// The smallest value that 95 of 100 do not exceed.
fn percentile_95(seconds: &[u64]) -> Option<u64> {
    let mut sorted = seconds.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * 95).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests;

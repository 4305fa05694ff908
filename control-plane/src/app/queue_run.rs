//! Queues a run.

use std::sync::Arc;

use latchkey_domain::environment::Change;
use latchkey_domain::id::{Digest, EnvironmentId, OrganizationId, RunId};
use latchkey_domain::run::{Request, Run, RunKind, RunState};
use latchkey_proto::v1::Reason;

use super::claims::Settled;
use super::environments::request_owner;
use super::transition::Subject;
use super::variables::{Given, NewVariable};
use super::{App, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::record::run::RunRecord;
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, Key, Version, keys};

pub(super) const LONGEST_MESSAGE: usize = 512;
const MOST_ADDRESSES: usize = 100;
const LONGEST_ADDRESS: usize = 512;
/// All addresses of a run together: its record must stay small.
const ADDRESSES: usize = 8 * 1024;
const ATTEMPTS: usize = 16;

/// What a person asks for.
#[derive(Clone, Debug)]
pub struct NewRun {
    pub organization: String,
    pub environment: String,
    pub configuration: Digest,
    pub kind: RunKind,
    pub message: String,
    pub target: Vec<String>,
    pub replace: Vec<String>,
    /// The environment's own setting when absent.
    pub auto_apply: Option<bool>,
    /// The environment's name typed again, for a destroy.
    pub destroy_confirmation: String,
    /// For this run alone.
    pub variables: Vec<NewVariable>,
    pub request_id: String,
}

/// A run that is about to be queued: checked, its caller's right too.
pub(super) struct Asked {
    pub(super) organization: OrganizationId,
    pub(super) environment: EnvironmentId,
    pub(super) kind: RunKind,
    pub(super) configuration: Digest,
    pub(super) message: String,
    pub(super) target: Vec<String>,
    pub(super) replace: Vec<String>,
    pub(super) auto_apply: Option<bool>,
    pub(super) retry_of: Option<RunId>,
    pub(super) variables: Vec<NewVariable>,
    /// Where the run is found when the request is repeated.
    pub(super) request_key: Key,
}

impl App {
    pub async fn queue_run(self: &Arc<Self>, caller: &Caller, new: NewRun) -> Result<Run> {
        let (standing, environment) =
            self.on(caller, &new.organization, &new.environment, Right::Operate).await?;
        check_request_id(&new.request_id)?;
        let organization = standing.organization;
        let request_key =
            keys::request(request_owner(caller), &format!("run:{organization}:{}", new.request_id));
        if let Some(made) = self.queued_before(&request_key, environment.value.id).await? {
            return Ok(made);
        }
        check(&new)?;
        let asked = Asked {
            organization,
            environment: environment.value.id,
            kind: new.kind,
            configuration: new.configuration,
            message: new.message,
            target: new.target,
            replace: new.replace,
            auto_apply: new.auto_apply,
            retry_of: None,
            variables: new.variables,
            request_key,
        };
        self.queue(caller, asked).await
    }

    /// Finds the run that a request has made: in the environment that the caller's right was
    /// checked on, and in no other.
    pub(super) async fn queued_before(
        &self,
        request: &Key,
        checked: EnvironmentId,
    ) -> Result<Option<Run>> {
        let Some(made) = self.fetch::<Text<RunId>>(request.clone()).await? else { return Ok(None) };
        let run = self.run(made.value.0).await?.value;
        if run.request.environment != checked {
            let message = "it queued a run of another environment; give a new request_id";
            return Err(Error::field("request_id", message));
        }
        Ok(Some(run))
    }

    pub(super) async fn queue(self: &Arc<Self>, caller: &Caller, mut asked: Asked) -> Result<Run> {
        let configuration = keys::configuration(asked.organization, &asked.configuration);
        if self.store.fetch(&configuration).await?.is_none() {
            let message = "no such configuration was uploaded here; upload it first";
            return Err(Error::field("configuration_digest", message));
        }
        let variables = std::mem::take(&mut asked.variables);
        let given = self.take_given(asked.organization, variables).await?;
        match self.queue_with(caller, asked, &given).await {
            Ok((run, Settled::Kept)) => Ok(run),
            Ok((run, Settled::NotNeeded)) => {
                self.release_given(&given).await?;
                Ok(run)
            }
            Err(error) => {
                self.release_given(&given).await?;
                Err(error)
            }
        }
    }

    /// Queues; answers also whether what was given became the run's.
    async fn queue_with(
        self: &Arc<Self>,
        caller: &Caller,
        asked: Asked,
        given: &Given,
    ) -> Result<(Run, Settled)> {
        let id = RunId::from_uuid(self.new_id());
        for _ in 0..ATTEMPTS {
            let environment = self.environment(asked.organization, asked.environment).await?;
            let settings = &environment.value.settings;
            let run = Run::queue(
                id,
                Request {
                    organization: asked.organization,
                    environment: asked.environment,
                    kind: asked.kind,
                    configuration: asked.configuration,
                    message: asked.message.clone(),
                    target: asked.target.clone(),
                    replace: asked.replace.clone(),
                    auto_apply: auto_apply(caller, asked.auto_apply, settings.auto_apply),
                    policy: settings.policy,
                    plan_rule: settings.plan_rule.clone(),
                    second_person: settings.second_person,
                    queued_by: caller.actor(),
                    queued_at: self.now(),
                    retry_of: asked.retry_of,
                    given: given.kept(),
                },
            );
            let request_key = asked.request_key.clone();
            match self.commit_queued(caller, run, environment, request_key, given).await? {
                Queued::Made(run) => return Ok((*run, Settled::Kept)),
                Queued::LostRace => {
                    if let Some(made) =
                        self.queued_before(&asked.request_key, asked.environment).await?
                    {
                        return Ok((made, Settled::NotNeeded));
                    }
                }
            }
        }
        Err(Error::refused(
            Reason::ChangedMeanwhile,
            "the environment changes too fast; repeat with the same request_id",
        ))
    }

    async fn commit_queued(
        self: &Arc<Self>,
        caller: &Caller,
        run: Run,
        environment: Loaded<crate::store::record::environment::Environment>,
        request_key: Key,
        given: &Given,
    ) -> Result<Queued> {
        let id = run.id;
        // The run is not stored yet: its version is only a placeholder.
        let loaded = Loaded { key: keys::run(id), version: Version::new(0), value: run.clone() };
        let subject = Subject { run: loaded, environment };
        let (next, change, effects) = self.with_turn(&subject, (run, Change::Keep, vec![])).await?;
        let request = &next.request;
        let hold = subject.environment.value.hold.after(id, &change);
        let mut changed = subject.environment.value.clone();
        let environment_key = subject.environment.key.clone();
        let expect = Expect::At(subject.environment.version);
        let mut batch = Batch::new();
        batch = if hold == changed.hold {
            // The policy and the turn that the run was given are those of this version.
            batch.check(environment_key, expect)
        } else {
            changed.hold = hold;
            let record = crate::store::record::environment::EnvironmentRecord::from(&changed);
            batch.put(environment_key, expect, encode(&record))
        };
        if next.state == RunState::Pending {
            batch = batch.put(keys::pending_run(request.environment, id), Expect::Absent, []);
        }
        let mut draft = self
            .draft(request.organization, caller.audit_name(), "queue_run", format!("run {id}"))
            .with("environment", changed.name.as_str())
            .with("configuration", request.configuration.to_string())
            .with("to", next.state.as_str());
        if let Some(first) = request.retry_of {
            draft = draft.with("retry_of", first.to_string());
        }
        if !request.given.is_empty() {
            let names: Vec<&str> = request.given.iter().map(|one| one.name.as_str()).collect();
            draft = draft.with("variables", names.join(", "));
        }
        let organization = request.organization;
        let batch = self.fix_variables(batch, organization, caller, id, given).await?;
        let batch = batch
            .put(keys::run(id), Expect::Absent, encode(&RunRecord::from(&next)))
            .put(keys::open_run(id), Expect::Absent, [])
            .put(keys::run_by_environment(request.environment, id), Expect::Absent, [])
            .put(request_key, Expect::Absent, encode(&Text(id)))
            .audit(draft);
        let batch = self.tell_of_run(batch, None, &next, &subject.environment.value, None).await?;
        match self.store.commit(batch).await {
            Ok(_) => {}
            Err(CommitError::Conflict { .. }) => return Ok(Queued::LostRace),
            Err(error @ CommitError::Store(_)) => return Err(error.into()),
        }
        tracing::info!(run_id = %id, state = %next.state, "a run was queued");
        self.note_limit(&next, &subject.environment.value);
        self.perform(&next, &subject.environment.value, effects);
        Ok(Queued::Made(Box::new(next)))
    }
}

enum Queued {
    Made(Box<Run>),
    LostRace,
}

/// A program may give an automatic apply up, but not ask for one that no owner set: that would
/// be a confirmation.
fn auto_apply(caller: &Caller, asked: Option<bool>, setting: bool) -> bool {
    match caller {
        Caller::User { .. } => asked.unwrap_or(setting),
        Caller::Service { .. } => asked.unwrap_or(setting) && setting,
    }
}

fn check(new: &NewRun) -> Result<()> {
    if new.message.chars().count() > LONGEST_MESSAGE {
        return Err(Error::field("message", "a message has up to 512 characters"));
    }
    for (field, addresses) in [("target", &new.target), ("replace", &new.replace)] {
        let fits = |address: &String| {
            (1..=LONGEST_ADDRESS).contains(&address.len())
                && !address.starts_with('-')
                && !address.chars().any(char::is_control)
        };
        if addresses.len() > MOST_ADDRESSES || !addresses.iter().all(fits) {
            let message = "give up to 100 resource addresses of up to 512 bytes, such as \
                           aws_instance.web[0]";
            return Err(Error::field(field, message));
        }
    }
    if new.target.iter().chain(&new.replace).map(String::len).sum::<usize>() > ADDRESSES {
        return Err(Error::field("target", "addresses have up to 8 KiB together; name modules"));
    }
    check_destroy(new.kind, &new.destroy_confirmation, &new.environment)
}

/// Whoever destroys says twice where.
pub(super) fn check_destroy(kind: RunKind, typed: &str, environment: &str) -> Result<()> {
    if kind != RunKind::Destroy || typed == environment {
        return Ok(());
    }
    Err(Error::field(
        "destroy_confirmation",
        "type the environment's name again to destroy all that is in it",
    ))
}

//! Environments: made, shown and set.

use std::sync::Arc;

use latchkey_domain::environment::Hold;
use latchkey_domain::id::{EnvironmentId, OrganizationId, RunId, UserId};
use latchkey_domain::run::RunState;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::guarded_change::{Backing, GivenCode, GuardedChange, Intent};
use super::people::taken;
use super::settings::{SettingsChange, asks, shown};
use super::{App, Page, PageRequest, check_name, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::record::environment::{Environment, EnvironmentRecord, Settings};
use crate::store::record::people::Access;
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, Expect, Key, Scan, keys};

/// An environment with the names that people know.
#[derive(Debug)]
pub struct EnvironmentView {
    pub environment: Environment,
    pub organization_name: String,
    pub pool_name: String,
}

impl App {
    /// Makes an environment; by a code, where it is weaker than one is by default.
    pub async fn create_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        settings: SettingsChange,
        request_id: &str,
        code: Option<SecretString>,
    ) -> Result<EnvironmentView> {
        let standing = self.owner(caller, organization).await?;
        check_name("environment", name)?;
        check_request_id(request_id)?;
        let organization = standing.organization;
        let request = keys::request(
            request_owner(caller),
            &format!("environment:{organization}:{request_id}"),
        );
        let mut done = Ok(());
        if self.store.fetch(&request).await?.is_none() {
            let (name, settings) = (name.to_owned(), Box::new(settings));
            let change = GuardedChange::Create { name, settings, request: request.clone() };
            let intent = Intent { caller: caller.clone(), organization, change };
            let request_id = request_id.to_owned();
            let proof = code.map(|code| GivenCode { code, request_id });
            done = self.change_guarded(intent, proof).await;
        }
        // The same request, sent at the same time, may have made it.
        let Some(made) = self.fetch::<Text<EnvironmentId>>(request).await? else {
            done?;
            return Err(Error::internal("an environment that was made vanished"));
        };
        let environment = self.environment(organization, made.value.0).await?.value;
        self.environment_view(environment, standing.organization_name).await
    }

    /// Makes the commit that makes an environment.
    pub(super) async fn creation_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        name: &str,
        settings: SettingsChange,
        request: &Key,
    ) -> Result<Batch> {
        let by_name = keys::environment_by_name(organization, name);
        if self.store.fetch(&by_name).await?.is_some() {
            return Err(taken("environment"));
        }
        let environment = Environment {
            id: EnvironmentId::from_uuid(self.new_id()),
            organization,
            name: name.to_owned(),
            settings: self.changed(organization, Settings::default(), settings).await?,
            hold: Hold::default(),
            break_glass: None,
            state: None,
            created_at: self.now(),
        };
        let id = encode(&Text(environment.id));
        let record = encode(&EnvironmentRecord::from(&environment));
        let subject = format!("environment {name}");
        let draft = self
            .draft(organization, caller.audit_name(), "create_environment", subject)
            .with("settings", shown(&environment.settings));
        Ok(Batch::new()
            .put(keys::environment(organization, environment.id), Expect::Absent, record)
            .put(by_name, Expect::Absent, id.clone())
            .put(request.clone(), Expect::Absent, id)
            .audit(draft))
    }

    pub async fn show_environment(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
    ) -> Result<EnvironmentView> {
        let (standing, found) = self.on(caller, organization, name, Right::Read).await?;
        self.environment_view(found.value, standing.organization_name).await
    }

    pub async fn list_environments(
        &self,
        caller: &Caller,
        organization: &str,
        page: PageRequest,
    ) -> Result<Page<EnvironmentView>> {
        let standing = self.member(caller, organization).await?;
        let (size, organization) = (page.size()?, standing.organization);
        let mut after =
            page.after::<String>()?.map(|name| keys::environment_by_name(organization, &name));
        let (mut items, mut next): (Vec<EnvironmentView>, _) = (vec![], None);
        'pages: loop {
            let scan = Scan::ascending(keys::environments_by_name(organization), size + 1);
            let found = self.scan(scan.after(after.take())).await?;
            for (key, value) in &found {
                let id: Text<EnvironmentId> = crate::store::record::decode(key, value)?;
                if standing.position.access(id.0) == Access::None {
                    continue;
                }
                if items.len() == size {
                    // Of one that is shown: the token tells its name.
                    next = items.last().map(|last| last.environment.name.clone());
                    break 'pages;
                }
                let environment = self.environment(organization, id.0).await?.value;
                let organization_name = standing.organization_name.clone();
                items.push(self.environment_view(environment, organization_name).await?);
            }
            match found.into_iter().nth(size) {
                Some((last, _)) => after = Some(last),
                None => break,
            }
        }
        Ok(Page { items, next })
    }

    pub async fn update_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        change: SettingsChange,
        proof: Option<GivenCode>,
    ) -> Result<EnvironmentView> {
        let right = if change.is_for_owners() { Right::Own } else { Right::Administer };
        let (standing, found) = self.on(caller, organization, name, right).await?;
        let (id, before) = (found.value.id, found.value.settings);
        let organization = standing.organization;
        let change = GuardedChange::Settings { environment: id, change: Box::new(change) };
        let intent = Intent { caller: caller.clone(), organization, change };
        self.change_guarded(intent, proof).await?;
        let next = self.environment(organization, id).await?.value;
        if asks(&next.settings) != asks(&before) {
            self.offer_again(&next).await?;
        }
        if next.settings.limits != before.limits {
            self.note_limits_of(&next).await?;
        }
        self.environment_view(next, standing.organization_name).await
    }

    /// Makes the commit that sets an environment.
    pub(super) async fn settings_batch(
        &self,
        caller: &Caller,
        found: Loaded<Environment>,
        change: SettingsChange,
        backing: Backing,
    ) -> Result<Batch> {
        let Loaded { key, version, value } = found;
        let mut next = value.clone();
        if backing == Backing::Code && change.sets_policy() {
            next.break_glass = None;
        }
        next.settings = self.changed(value.organization, value.settings.clone(), change).await?;
        let subject = format!("environment {}", value.name);
        let draft = self
            .draft(value.organization, caller.audit_name(), "update_environment", subject)
            .with("before", shown(&value.settings))
            .with("after", shown(&next.settings));
        let record = encode(&EnvironmentRecord::from(&next));
        Ok(Batch::new().put(key, Expect::At(version), record).audit(draft))
    }

    /// Lets an environment start runs again after a person has dealt with what a run left.
    pub async fn unfreeze_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        run: RunId,
    ) -> Result<EnvironmentView> {
        let standing = self.owner(caller, organization).await?;
        let found = self.environment_named(standing.organization, name).await?;
        let missing = || Error::not_found("run of this environment");
        let of_run = match self.run(run).await {
            Ok(run) => run.value.request.environment,
            Err(error) if error.reason() == Reason::NotFound => return Err(missing()),
            Err(error) => return Err(error),
        };
        if of_run != found.value.id {
            return Err(missing());
        }
        let frozen = found.value.hold.frozen.as_ref();
        if frozen.is_none() {
            return self.environment_view(found.value, standing.organization_name).await;
        }
        if frozen.is_some_and(|frozen| frozen.run != run) {
            let message = "another run froze the environment; `latchkey env show` names it";
            return Err(Error::field("run_id", message));
        }
        self.check_given_up(run).await?;
        let mut next = found.value;
        next.hold.frozen = None;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "unfreeze_environment",
                format!("environment {name}"),
            )
            .with("run", run.to_string());
        let record = encode(&EnvironmentRecord::from(&next));
        let batch = Batch::new().put(found.key, Expect::At(found.version), record).audit(draft);
        self.store.commit(standing.guard(batch)).await?;
        self.give_turns(standing.organization, next.id).await?;
        let next = self.environment(standing.organization, next.id).await?.value;
        self.environment_view(next, standing.organization_name).await
    }

    /// Refuses while a run that was lost may come back and write a state.
    pub(super) async fn check_given_up(&self, run: RunId) -> Result<()> {
        match self.run(run).await {
            Ok(found) if found.value.state == RunState::Lost => {
                let message = "the run is lost but not given up: its runner may still be \
                               applying. Cancel the run first";
                Err(Error::refused(Reason::WrongState, message))
            }
            Ok(_) => Ok(()),
            // A restore forgot it: nobody waits for it.
            Err(error) if error.reason() == Reason::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves the environment's open job to the pool that it now belongs to.
    async fn offer_again(&self, environment: &Environment) -> Result<()> {
        for (key, _) in self.list(keys::open_runs()).await? {
            let Some(id) = key.last_id().map(RunId::from_bytes) else { continue };
            let run = self.run(id).await?.value;
            if run.request.environment != environment.id {
                continue;
            }
            if let Some(phase) = run.open_phase() {
                self.dispatch.withdraw(run.job_id(phase));
                self.offer(&run, phase, environment);
            }
        }
        Ok(())
    }

    pub(super) async fn environment_view(
        &self,
        environment: Environment,
        organization_name: String,
    ) -> Result<EnvironmentView> {
        let pool_name = match environment.settings.pool {
            Some(pool) => self.pool(environment.organization, pool).await?.name,
            None => String::new(),
        };
        Ok(EnvironmentView { environment, organization_name, pool_name })
    }
}

/// Request ids are kept per caller; programs have their own space of ids.
pub(super) fn request_owner(caller: &Caller) -> UserId {
    match caller {
        Caller::User { id, .. } => *id,
        Caller::Service { id, .. } => UserId::from_bytes(*id.as_bytes()),
    }
}

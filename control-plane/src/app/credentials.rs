//! What a phase is given, by the environment's modes: what STS is asked for, and what a phase
//! that demands no code gets of the organization's keys.
//!
//! Each answer says of what kind it is and of which account, so that what replaces it while the
//! phase runs can be held against it.

use std::time::Duration;

use latchkey_domain::id::{OrganizationId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Actor, Run};
use latchkey_proto::v1::Reason;

use super::App;
use super::transition::{Subject, of_phase};
use crate::error::{Error, Result};
use crate::store::record::authentication::CredentialsKind;
use crate::store::record::encode;
use crate::store::record::environment::{CodeCredentials, Environment, PlainCredentials, Settings};
use crate::store::{Batch, CommitError, Expect};
use crate::sts::errors::{About, in_words, sentence};
use crate::sts::{
    Credentials, Exchange, Identity, LONGEST_ROLE_SESSION, RoleWanted, Wanted, account_of,
    account_of_role, identity_of, partition_of, partition_of_region,
};

const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// From this share of the packed space on a person is warned, in percent.
pub(super) const PACKED_WARNING: u32 = 80;

/// What a phase gets without a code.
#[derive(Debug)]
pub(super) struct Plain {
    pub(super) credentials: Credentials,
    pub(super) kind: CredentialsKind,
    pub(super) account: Option<String>,
    pub(super) packed_percent: Option<u32>,
}

/// For whom and what a session is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose<'a> {
    pub(super) environment: &'a Environment,
    pub(super) phase: Phase,
    pub(super) run: Option<RunId>,
    /// What the role's CloudTrail shows.
    pub(super) session_name: &'a str,
    /// Who is answerable for it; see [`source_of`] for programs.
    pub(super) source: &'a str,
}

impl App {
    /// Says what a code buys for a phase of a run.
    pub(super) async fn wanted_by_code(
        &self,
        run: &Run,
        environment: &Environment,
        phase: Phase,
        user: &str,
    ) -> Result<Wanted> {
        let session_name = session_name(run);
        let environment = &of_phase(environment, run, phase);
        let purpose = Purpose {
            environment,
            phase,
            run: Some(run.id),
            session_name: &session_name,
            source: user,
        };
        match environment.settings.code_credentials {
            CodeCredentials::Session => Ok(session_wanted(&environment.settings)),
            CodeCredentials::Role => self.role_wanted(purpose).await,
        }
    }

    /// Says what `AssumeRole` is asked for a phase.
    pub(super) async fn role_wanted(&self, purpose: Purpose<'_>) -> Result<Wanted> {
        let Purpose { environment, phase, run, session_name, source } = purpose;
        let settings = &environment.settings;
        let role = settings.roles.of(phase);
        if role.arn.is_empty() {
            let message = format!(
                "the environment names no role for the {phase}; an owner does so with `latchkey env \
                 set --{phase}-role`"
            );
            return Err(Error::refused(Reason::ExchangeRefused, message));
        }
        let expected = partition_of_region(&settings.region);
        if partition_of(&role.arn).is_some_and(|found| found != expected) {
            let message = format!(
                "the role {} cannot be assumed in the region {} that the {phase} is made in; set \
                 another role with `latchkey env set`, or discard the run and queue it again",
                role.arn, settings.region
            );
            return Err(Error::refused(Reason::ExchangeRefused, message));
        }
        let organization = environment.organization;
        let organization_name = self.organization(organization).await?.value.name;
        let mut tags = vec![
            ("organization".to_owned(), organization_name),
            ("environment".to_owned(), environment.name.clone()),
        ];
        tags.extend(run.map(|run| ("run".to_owned(), run.to_string())));
        tags.push(("phase".to_owned(), phase.as_str().to_owned()));
        Ok(Wanted {
            region: settings.region.clone(),
            duration: settings.session_duration.min(LONGEST_ROLE_SESSION),
            role: Some(RoleWanted {
                arn: role.arn.clone(),
                session_name: identity_of(session_name),
                source_identity: Some(identity_of(source)),
                tags,
                external_id: Some(self.external_id(organization).await?),
                policy: Some(role.policy.clone()).filter(|policy| !policy.is_empty()),
                policy_arns: role.policy_arns.clone(),
            }),
        })
    }

    /// Answers the organization's external id, which is made when it is first asked for.
    pub(super) async fn external_id(&self, organization: OrganizationId) -> Result<String> {
        loop {
            let found = self.organization(organization).await?;
            if !found.value.external_id.is_empty() {
                return Ok(found.value.external_id);
            }
            let mut next = found.value;
            let random: [u8; 16] = crate::seal::random();
            next.external_id = format!("latchkey-{:032x}", u128::from_be_bytes(random));
            let subject = format!("organization {}", next.name);
            let draft = self
                .draft(organization, "system", "make_external_id", subject)
                .with("external_id", next.external_id.as_str());
            let batch = Batch::new().put(found.key, Expect::At(found.version), encode(&next));
            let batch = batch.audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(next.external_id),
                // Another was faster.
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
    }

    /// Gets what a phase that demands no code may have, where the environment wants it to have
    /// anything and the organization has keys. The error is for the run's reason.
    pub(super) async fn plain(
        &self,
        subject: &Subject,
        phase: Phase,
    ) -> Result<Option<Plain>, String> {
        let run = &subject.run.value;
        let environment = &of_phase(&subject.environment.value, run, phase);
        let settings = &environment.settings;
        let said = |error: Error| error.message().to_owned();
        if settings.plain_credentials == PlainCredentials::None {
            return Ok(None);
        }
        let organization = run.request.organization;
        let Some(keys) = self.organization_keys(organization).await.map_err(said)? else {
            return Ok(None);
        };
        let keys = keys.keys();
        let (wanted, kind) = match settings.plain_credentials {
            PlainCredentials::None => return Ok(None),
            PlainCredentials::Static => {
                let account = self.account_asked(&keys, settings).await?;
                self.check_listed(organization, Some(account.clone())).await.map_err(said)?;
                return Ok(Some(Plain {
                    credentials: keys,
                    kind: CredentialsKind::Static,
                    account: Some(account),
                    packed_percent: None,
                }));
            }
            PlainCredentials::Session => (session_wanted(settings), CredentialsKind::Session),
            PlainCredentials::Role => {
                let listed = self.check_listed(organization, account_of(&keys.access_key_id));
                listed.await.map_err(said)?;
                let (session_name, source) = (session_name(run), source_of(&run.request.queued_by));
                let purpose = Purpose {
                    environment,
                    phase,
                    run: Some(run.id),
                    session_name: &session_name,
                    source: &source,
                };
                let wanted = self.role_wanted(purpose).await.map_err(said)?;
                (wanted, CredentialsKind::Role(settings.roles.of(phase).arn.clone()))
            }
        };
        let (credentials, packed_percent) = self.issued(&keys, &wanted).await?;
        let account = self.account_asked(&credentials, settings).await?;
        self.check_account(organization, &kind, &account).await.map_err(said)?;
        let floor = self.floor(settings);
        if credentials.expires_at.is_some_and(|at| at.since(self.now()) < floor) {
            return Err(format!(
                "AWS issued a session that lives shorter than the {} that this phase must have; \
                 lengthen the session duration or lower the floor with `latchkey env set`",
                in_words(floor)
            ));
        }
        Ok(Some(Plain { credentials, kind, account: Some(account), packed_percent }))
    }

    /// The least life that credentials must have when a phase starts.
    pub(super) fn floor(&self, settings: &Settings) -> Duration {
        self.session_floor.max(settings.session_floor)
    }

    /// Refuses to ask for what no phase would be started with: settings and the control plane's own
    /// floor may be of different times.
    pub(super) fn check_above_floor(&self, wanted: &Wanted, settings: &Settings) -> Result<()> {
        let floor = self.floor(settings);
        if wanted.duration > floor {
            return Ok(());
        }
        let message = format!(
            "a session would live {}, and a phase must have more than {} when it starts; nothing was \
             spent. Lengthen the session duration or lower the floor with `latchkey env set`",
            in_words(wanted.duration),
            in_words(floor)
        );
        Err(Error::refused(Reason::ExchangeRefused, message))
    }

    /// Asks for a session without a code: nothing is spent by asking again.
    async fn issued(
        &self,
        keys: &Credentials,
        wanted: &Wanted,
    ) -> Result<(Credentials, Option<u32>), String> {
        for attempt in 1..=ATTEMPTS {
            match self.sts.exchange(keys, None, wanted).await {
                Exchange::Issued { credentials, packed_percent, .. } => {
                    return Ok((credentials, packed_percent));
                }
                Exchange::Refused(refused) => {
                    return Err(sentence(&refused, About { wanted, next_window: None }).1);
                }
                Exchange::Unknown { .. } | Exchange::NotReached if attempt < ATTEMPTS => {
                    tokio::time::sleep(PAUSE).await;
                }
                Exchange::Unknown { .. } | Exchange::NotReached => {}
            }
        }
        Err("AWS STS did not answer, so there are no credentials; queue the run again".into())
    }

    /// Asks whose credentials these are, as often as it takes within reason.
    async fn account_asked(
        &self,
        credentials: &Credentials,
        settings: &Settings,
    ) -> Result<String, String> {
        for _ in 0..ATTEMPTS {
            match self.sts.identify(credentials, &settings.region).await {
                Identity::Account(account) => return Ok(account),
                Identity::Refused(refused) => {
                    let wanted = session_wanted(settings);
                    let about = About { wanted: &wanted, next_window: None };
                    return Err(sentence(&refused, about).1);
                }
                Identity::Unavailable => tokio::time::sleep(PAUSE).await,
            }
        }
        Err("AWS STS did not tell whose session it issued; queue the run again".into())
    }

    /// Checks that credentials belong where they may: to a listed account, or to the role's own.
    pub(super) async fn check_account(
        &self,
        organization: OrganizationId,
        kind: &CredentialsKind,
        account: &str,
    ) -> Result<()> {
        match kind {
            CredentialsKind::Session | CredentialsKind::Static => {
                self.check_listed(organization, Some(account.to_owned())).await
            }
            CredentialsKind::Role(arn) if account_of_role(arn) == Some(account) => Ok(()),
            CredentialsKind::Role(arn) => {
                let message = format!(
                    "AWS says that the session belongs to the account {account}, which is not that \
                     of the role {arn}; it is not used"
                );
                Err(Error::refused(Reason::AccountNotListed, message).with("account", account))
            }
        }
    }
}

/// Says what `GetSessionToken` is asked.
pub(super) fn session_wanted(settings: &Settings) -> Wanted {
    Wanted { region: settings.region.clone(), duration: settings.session_duration, role: None }
}

/// How long what a phase gets would live; `None` for ever, or when it gets nothing.
pub(super) fn life(settings: &Settings, by_code: bool) -> Option<Duration> {
    let of_role = settings.session_duration.min(LONGEST_ROLE_SESSION);
    match (by_code, settings.code_credentials, settings.plain_credentials) {
        (true, CodeCredentials::Session, _) | (false, _, PlainCredentials::Session) => {
            Some(settings.session_duration)
        }
        (true, CodeCredentials::Role, _) | (false, _, PlainCredentials::Role) => Some(of_role),
        (false, _, PlainCredentials::None | PlainCredentials::Static) => None,
    }
}

fn session_name(run: &Run) -> String {
    format!("run-{}", run.id)
}

/// Who is answerable for a run that demands no code. A token may be named like a person: its mark
/// is one that no person's name can have.
fn source_of(queued_by: &Actor) -> String {
    match queued_by {
        Actor::User { name, .. } => name.clone(),
        Actor::Service { name } => format!("service-token={name}"),
    }
}

#[cfg(test)]
mod tests;

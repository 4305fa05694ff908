//! Changes that weaken what a code protects, which therefore take a code themselves.
//!
//! A stolen login must not be enough to switch the codes off. Where a complete triple stands
//! ready for the caller, their own or the organization's, these take a code of its device: a
//! weaker setting of an environment ([`weakens`]), another list of AWS accounts, another triple.
//! The first set-up, while no triple is complete or no account listed, takes none: no code could
//! be spent.
//!
//! 1. The use case has authorized the caller, and tried the change out: what is malformed costs
//!    no code.
//! 2. A `request_id` seen before is answered with what is recorded.
//! 3. One commit counts the attempt at the device, remembers the code's digest and records the
//!    attempt as *spending*, as for a run ([`super::authenticate_run`]).
//! 4. One call to STS, for the shortest session there is, which is dropped at once.
//! 5. `GetCallerIdentity` must answer a listed account.
//! 6. One commit makes the change and closes the record.
//!
//! An attempt found still open at a start is *unknown*: its change is not made, the code is spent.
//! Like those of runs, the steps from 3 on run in a task of their own.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::device::{CodeDigest, Device};
use latchkey_domain::id::{AuthenticationId, Digest, EnvironmentId, OrganizationId, UserId};
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::token_code;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::authenticate_run::{DeviceAttempt, unknown_sentence};
use super::secrets::TRIPLE;
use super::settings::SettingsChange;
use super::variables::{NewVariable, Scope};
use super::{App, check_request_id};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::authentication::DeviceRecord;
use crate::store::record::environment::{PlainCredentials, Settings};
use crate::store::record::variable::Category;
use crate::store::record::{Loaded, Millis, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, keys};
use crate::sts::errors::{About, sentence};
use crate::sts::{Code, Credentials, Exchange, Identity, Triple, Wanted, account_of, partition_of};

const ATTEMPTS: usize = 32;
const IDENTIFY_ATTEMPTS: u32 = 5;
const IDENTIFY_PAUSE: Duration = Duration::from_secs(2);

/// The shortest session that AWS issues.
const SESSION: Duration = Duration::from_secs(15 * 60);

/// A code that was given along with a change.
#[derive(Clone, Debug)]
pub struct GivenCode {
    pub code: SecretString,
    pub request_id: String,
}

/// A change that may take a code.
#[derive(Clone, Debug)]
pub(super) enum GuardedChange {
    Settings { environment: EnvironmentId, change: Box<SettingsChange> },
    Accounts(Vec<String>),
    SetVariable { stored: VariableScope, scope: Scope, variable: NewVariable },
    DeleteVariable { stored: VariableScope, scope: Scope, category: Category, name: String },
}

/// Who changes what.
#[derive(Clone, Debug)]
pub(super) struct Intent {
    pub(super) caller: Caller,
    pub(super) organization: OrganizationId,
    pub(super) change: GuardedChange,
}

/// Whether a change was made by a code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Code,
    RightAlone,
}

/// A code spent for a change, and what became of it.
#[derive(Debug, Serialize, Deserialize)]
struct ChangeRecord {
    id: Text<AuthenticationId>,
    organization: Text<OrganizationId>,
    user: String,
    device: String,
    access_key_id: String,
    /// A keyed digest of what was asked for: a request id stands for one change.
    asked: Text<Digest>,
    subject: String,
    submitted_at: Millis,
    outcome: ChangeOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ChangeOutcome {
    Spending,
    Made { aws_request_id: Option<String>, at: Millis },
    Refused { reason: String, message: String, aws_request_id: Option<String>, at: Millis },
}

/// What a start looks at: the request whose attempt may be open.
#[derive(Debug, Serialize, Deserialize)]
struct OpenChange {
    user: Text<UserId>,
    request: String,
}

type Refusal = (Reason, String, Option<String>);

impl App {
    /// Makes a change by the caller's right alone, or by a code where it takes one.
    pub(super) async fn change_guarded(
        self: &Arc<Self>,
        intent: Intent,
        proof: Option<GivenCode>,
    ) -> Result<()> {
        let (user, _) = match intent.caller.person() {
            Ok(person) => person,
            // Never guarded: what is, takes a person anyhow.
            Err(_) => return self.change_by_right(&intent).await,
        };
        if let Some(proof) = &proof {
            check_request_id(&proof.request_id)?;
            let request = request_key(user, intent.organization, &proof.request_id);
            if let Some(known) = self.fetch::<ChangeRecord>(request.clone()).await? {
                return self.recorded_change(request, known.value, &intent).await;
            }
        }
        let Some(triple) = self.guard_of_change(&intent, user, proof.is_some()).await? else {
            return self.change_by_right(&intent).await;
        };
        let Some(proof) = proof else {
            let message = format!(
                "this weakens what a token code protects, so it takes one: submit a code of the \
                 device {}",
                triple.serial
            );
            return Err(Error::refused(Reason::MfaRequired, message).about("token_code"));
        };
        token_code::check(proof.code.expose_secret().as_bytes()).map_err(|_| {
            Error::field("token_code", "a token code is exactly six digits; nothing was spent")
        })?;
        // What is malformed is found out before anything is spent.
        drop(self.change_batch(&intent, Backing::Code).await?);
        let app = Arc::clone(self);
        let attempted = tokio::spawn(async move { app.change_by_code(intent, user, proof).await });
        attempted.await.map_err(Error::internal)?
    }

    async fn change_by_right(&self, intent: &Intent) -> Result<()> {
        let batch = self.change_batch(intent, Backing::RightAlone).await?;
        self.store.commit(batch).await?;
        Ok(())
    }

    /// Makes the commit that a change is, as things stand.
    async fn change_batch(&self, intent: &Intent, backing: Backing) -> Result<Batch> {
        let Intent { caller, organization, change } = intent;
        match change {
            GuardedChange::Settings { environment, change } => {
                let found = self.environment(*organization, *environment).await?;
                self.settings_batch(caller, found, *change.clone(), backing).await
            }
            GuardedChange::Accounts(accounts) => {
                self.accounts_batch(caller, *organization, accounts).await
            }
            GuardedChange::SetVariable { stored, scope, variable } => {
                let batch =
                    self.set_batch(caller, *organization, (*stored, scope), variable).await?;
                Ok(match backing {
                    Backing::Code => self.without_old_secret(batch, *stored, variable).await?,
                    Backing::RightAlone => batch,
                })
            }
            GuardedChange::DeleteVariable { stored, scope, category, name } => {
                self.delete_batch(caller, *organization, (*stored, scope), *category, name).await
            }
        }
    }

    /// Answers the triple whose code a change takes, if it takes one. With a code that is given
    /// also a stricter policy takes one, where the one before was set on the host.
    async fn guard_of_change(
        &self,
        intent: &Intent,
        user: UserId,
        given: bool,
    ) -> Result<Option<Triple>> {
        let Intent { organization, change, .. } = intent;
        let organization = *organization;
        let personal = VariableScope::Personal(organization, user);
        match change {
            GuardedChange::Settings { environment, change } => {
                let found = self.environment(organization, *environment).await?.value;
                let before = found.settings;
                let after = self.changed(organization, before.clone(), *change.clone()).await?;
                let mends = given && found.break_glass.is_some() && change.sets_policy();
                if !weakens(&before, &after) && !mends {
                    return Ok(None);
                }
            }
            GuardedChange::Accounts(accounts) => {
                let listed = self.organization(organization).await?.value.aws_accounts;
                // With none, no code can be spent.
                if listed.is_empty() || listed == *accounts {
                    return Ok(None);
                }
            }
            GuardedChange::SetVariable {
                stored,
                variable: NewVariable { name, category, .. },
                ..
            }
            | GuardedChange::DeleteVariable { stored, name, category, .. } => {
                if *category != Category::Environment || !TRIPLE.contains(&name.as_str()) {
                    return Ok(None);
                }
                match stored {
                    VariableScope::Personal(..) => return self.guarding_triple(personal).await,
                    VariableScope::Organization(_) => {}
                    VariableScope::Environment(..) | VariableScope::Run(_) => return Ok(None),
                }
            }
        }
        match self.guarding_triple(personal).await? {
            Some(own) => Ok(Some(own)),
            None => self.guarding_triple(VariableScope::Organization(organization)).await,
        }
    }

    /// Steps 3 to 6.
    async fn change_by_code(
        self: &Arc<Self>,
        intent: Intent,
        user: UserId,
        proof: GivenCode,
    ) -> Result<()> {
        let organization = intent.organization;
        let request = request_key(user, organization, &proof.request_id);
        let counted = self.count_change(&intent, user, &proof, &request).await;
        let (record, triple, device, digest) = match counted {
            Ok(Some(counted)) => counted,
            // What stands in the way may be this very request, sent at the same time.
            Ok(None) => return self.recorded_by(request, &intent).await,
            Err(error) => match self.fetch::<ChangeRecord>(request.clone()).await? {
                Some(known) => return self.recorded_change(request, known.value, &intent).await,
                None => return Err(error),
            },
        };
        latchkey_failpoint::reach("cp.change.counted");
        let spent =
            self.spend_for_change(organization, &triple, proof.code, device, digest).await?;
        let refusal = match spent {
            Ok(aws_request_id) => {
                match self.make_change(&intent, &request, &record, aws_request_id).await {
                    Ok(()) => return Ok(()),
                    Err(error) if error.reason() == Reason::StoreUnavailable => return Err(error),
                    // It was possible when it was tried out: something changed since.
                    Err(error) => (error.reason(), error.message().to_owned(), None),
                }
            }
            Err(refusal) => refusal,
        };
        self.refuse_change(request, record, refusal, &intent.caller.audit_name()).await
    }

    /// Step 3. `None` when the same request won.
    async fn count_change(
        &self,
        intent: &Intent,
        user: UserId,
        proof: &GivenCode,
        request: &Key,
    ) -> Result<Option<(ChangeRecord, Triple, Key, CodeDigest)>> {
        let organization = intent.organization;
        for _ in 0..ATTEMPTS {
            self.check_history()?;
            self.check_codes_open().await?;
            let triple = self.guard_of_change(intent, user, true).await?.ok_or_else(|| {
                let message = "it takes no code any more; look again, then repeat without one";
                Error::refused(Reason::ChangedMeanwhile, message)
            })?;
            self.check_listed(organization, account_of(&triple.access_key_id)).await?;
            let DeviceAttempt { key: device, expect, counted, digest } =
                self.device_attempt(&triple, &proof.code).await?;
            let record = ChangeRecord {
                id: Text(AuthenticationId::from_uuid(self.new_id())),
                organization: Text(organization),
                user: intent.caller.name().to_owned(),
                device: triple.serial.clone(),
                access_key_id: triple.access_key_id.clone(),
                asked: Text(self.asked(intent)),
                subject: self.subject_of(intent).await?,
                submitted_at: self.now().into(),
                outcome: ChangeOutcome::Spending,
            };
            let open = OpenChange { user: Text(user), request: request_text(organization, proof) };
            let draft = self
                .draft(organization, intent.caller.audit_name(), "submit_code", &record.subject)
                .with("authentication", record.id.0.to_string())
                .with("device", record.device.as_str());
            let batch = Batch::new()
                .put(device.clone(), expect, encode(&DeviceRecord::from(&counted)))
                .put(request.clone(), Expect::Absent, encode(&record))
                .put(keys::change_open(record.id.0), Expect::Absent, encode(&open))
                .audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(Some((record, triple, device, digest))),
                Err(CommitError::Conflict { key }) if key == *request => return Ok(None),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(
            Reason::DeviceBusy,
            "too many codes are being submitted for this device at once; try again in a moment",
        ))
    }

    /// Steps 4 and 5: what AWS says of the code.
    async fn spend_for_change(
        &self,
        organization: OrganizationId,
        triple: &Triple,
        code: SecretString,
        device: Key,
        digest: CodeDigest,
    ) -> Result<std::result::Result<Option<String>, Refusal>> {
        let region = home_region(&triple.serial).to_owned();
        let wanted = Wanted { region, duration: SESSION, role: None };
        let exchange = {
            let code = Code { serial: &triple.serial, digits: &code };
            self.sts.exchange(&triple.keys(), Some(code), &wanted).await
        };
        drop(code);
        latchkey_failpoint::reach("cp.change.answered");
        let (session, request_id) = match exchange {
            Exchange::Issued { credentials, request_id, .. } => (credentials, request_id),
            Exchange::Refused(refused) => {
                let next_window = Some(Device::next_window(self.now()));
                let (reason, message) = sentence(&refused, About { wanted: &wanted, next_window });
                return Ok(Err((reason, with_way_out(reason, message), refused.request_id)));
            }
            Exchange::Unknown { request_id } => {
                return Ok(Err((Reason::ExchangeUnknown, unknown_sentence(), request_id)));
            }
            Exchange::NotReached => {
                self.give_back(&device, digest).await?;
                let message = "AWS could not be reached; the code was not sent and is still good. \
                               Try again.";
                return Ok(Err((Reason::AwsUnreachable, message.to_owned(), None)));
            }
        };
        Ok(self.whose(organization, &session, &wanted).await?.map(|()| request_id))
    }

    async fn whose(
        &self,
        organization: OrganizationId,
        session: &Credentials,
        wanted: &Wanted,
    ) -> Result<std::result::Result<(), Refusal>> {
        for attempt in 1..=IDENTIFY_ATTEMPTS {
            match self.sts.identify(session, &wanted.region).await {
                Identity::Account(account) => {
                    return match self.check_listed(organization, Some(account)).await {
                        Ok(()) => Ok(Ok(())),
                        Err(error) if error.reason() == Reason::AccountNotListed => {
                            Ok(Err((error.reason(), error.message().to_owned(), None)))
                        }
                        Err(error) => Err(error),
                    };
                }
                Identity::Refused(refused) => {
                    let about = About { wanted, next_window: None };
                    let (reason, message) = sentence(&refused, about);
                    return Ok(Err((reason, message, refused.request_id)));
                }
                Identity::Unavailable if attempt < IDENTIFY_ATTEMPTS => {
                    tokio::time::sleep(IDENTIFY_PAUSE).await;
                }
                Identity::Unavailable => {}
            }
        }
        let message = "AWS did not tell whose session it issued; use a new code";
        Ok(Err((Reason::ExchangeUnknown, message.to_owned(), None)))
    }

    /// Step 6. Others may change the same record meanwhile: the code is spent, so it is tried
    /// again on what they made.
    async fn make_change(
        &self,
        intent: &Intent,
        request: &Key,
        record: &ChangeRecord,
        aws_request_id: Option<String>,
    ) -> Result<()> {
        let outcome =
            ChangeOutcome::Made { aws_request_id: aws_request_id.clone(), at: self.now().into() };
        for _ in 0..ATTEMPTS {
            let made = ChangeRecord { outcome: outcome.clone(), ..record.again() };
            let actor = intent.caller.audit_name();
            let mut draft = self
                .draft(intent.organization, actor, "authenticate_change", &record.subject)
                .with("authentication", record.id.0.to_string())
                .with("device", record.device.as_str());
            if let Some(id) = &aws_request_id {
                draft = draft.with("aws_request_id", id.as_str());
            }
            let batch = self
                .change_batch(intent, Backing::Code)
                .await?
                .put(request.clone(), Expect::Anything, encode(&made))
                .delete(keys::change_open(record.id.0), Expect::Anything)
                .audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it changes too fast; look again"))
    }

    async fn refuse_change(
        &self,
        request: Key,
        record: ChangeRecord,
        (reason, message, aws_request_id): Refusal,
        actor: &str,
    ) -> Result<()> {
        let outcome = ChangeOutcome::Refused {
            reason: reason.name().to_owned(),
            message,
            aws_request_id,
            at: self.now().into(),
        };
        let mut draft = self
            .draft(record.organization.0, actor, "refuse_code", &record.subject)
            .with("authentication", record.id.0.to_string())
            .with("device", record.device.as_str())
            .with("refusal", reason.name());
        if let ChangeOutcome::Refused { aws_request_id: Some(id), .. } = &outcome {
            draft = draft.with("aws_request_id", id.as_str());
        }
        let closed = ChangeRecord { outcome: outcome.clone(), ..record.again() };
        let batch = Batch::new()
            .put(request, Expect::Anything, encode(&closed))
            .delete(keys::change_open(record.id.0), Expect::Anything)
            .audit(draft);
        self.store.commit(batch).await?;
        answer(outcome)
    }

    async fn recorded_by(&self, request: Key, intent: &Intent) -> Result<()> {
        let known = self.fetch::<ChangeRecord>(request.clone()).await?;
        let known = known.ok_or_else(|| Error::internal("a recorded request vanished"))?;
        self.recorded_change(request, known.value, intent).await
    }

    /// Answers what is recorded of a request, once it is.
    async fn recorded_change(
        &self,
        request: Key,
        known: ChangeRecord,
        intent: &Intent,
    ) -> Result<()> {
        if known.asked.0 != self.asked(intent) {
            let message = "it was used for another change; give a new one";
            return Err(Error::field("request_id", message));
        }
        let mut feed = self.store.watch(keys::exactly(&request));
        loop {
            let found: Option<Loaded<ChangeRecord>> = self.fetch(request.clone()).await?;
            let found = found.ok_or_else(|| Error::internal("a recorded request vanished"))?;
            if found.value.outcome != ChangeOutcome::Spending {
                return answer(found.value.outcome);
            }
            feed.next().await;
        }
    }

    /// At a start: no change of an attempt that was cut off is made.
    pub async fn settle_changes(&self) -> Result<()> {
        for (key, found) in self.list(keys::all(keys::Kind::ChangeOpen)).await? {
            let open: OpenChange = decode(&key, &found)?;
            let request = keys::request(open.user.0, &open.request);
            let Some(record) = self.fetch::<ChangeRecord>(request.clone()).await? else {
                continue;
            };
            let refusal = (Reason::ExchangeUnknown, unknown_sentence(), None);
            match self.refuse_change(request, record.value, refusal, "system").await {
                Err(error) if error.reason() == Reason::ExchangeUnknown => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// A digest of what is asked for. Keyed: a value may be short.
    fn asked(&self, intent: &Intent) -> Digest {
        let Intent { organization, change, .. } = intent;
        let value = match change {
            GuardedChange::SetVariable { variable, .. } => variable.value.expose_secret(),
            GuardedChange::Settings { .. }
            | GuardedChange::Accounts(_)
            | GuardedChange::DeleteVariable { .. } => "",
        };
        // What is secret is not shown by `Debug`.
        let text = SecretString::from(format!("{organization}\0{change:?}\0{value}"));
        Digest::from_bytes(self.master.digest(b"guarded change", text.expose_secret().as_bytes()))
    }

    async fn subject_of(&self, intent: &Intent) -> Result<String> {
        Ok(match &intent.change {
            GuardedChange::Settings { environment, .. } => {
                let found = self.environment(intent.organization, *environment).await?;
                format!("environment {}", found.value.name)
            }
            GuardedChange::Accounts(_) => {
                let found = self.organization(intent.organization).await?;
                format!("organization {}", found.value.name)
            }
            GuardedChange::SetVariable { variable: NewVariable { name, .. }, .. }
            | GuardedChange::DeleteVariable { name, .. } => format!("variable {name}"),
        })
    }
}

impl ChangeRecord {
    /// The same attempt, to be written again.
    fn again(&self) -> Self {
        Self {
            user: self.user.clone(),
            device: self.device.clone(),
            access_key_id: self.access_key_id.clone(),
            subject: self.subject.clone(),
            outcome: self.outcome.clone(),
            ..*self
        }
    }
}

fn answer(outcome: ChangeOutcome) -> Result<()> {
    match outcome {
        ChangeOutcome::Made { .. } => Ok(()),
        ChangeOutcome::Refused { reason, message, aws_request_id, .. } => {
            let reason = Reason::from_str_name(&format!("REASON_{reason}"))
                .unwrap_or(Reason::ExchangeRefused);
            let error = Error::refused(reason, message).about("token_code");
            Err(match aws_request_id {
                Some(id) => error.with("aws_request_id", id),
                None => error,
            })
        }
        ChangeOutcome::Spending => {
            Err(Error::internal("an attempt was answered before it had an outcome"))
        }
    }
}

fn request_text(organization: OrganizationId, proof: &GivenCode) -> String {
    format!("change:{organization}:{}", proof.request_id)
}

fn request_key(user: UserId, organization: OrganizationId, request_id: &str) -> Key {
    keys::request(user, &format!("change:{organization}:{request_id}"))
}

/// A triple that AWS does not know can never be changed by its own code.
fn with_way_out(reason: Reason, message: String) -> String {
    let stands_in_its_own_way =
        matches!(reason, Reason::KeyRejected | Reason::SecretRejected | Reason::DeviceRejected);
    if !stands_in_its_own_way {
        return message;
    }
    format!(
        "{message} If the stored keys or the device can never work, `latchkey-control-plane \
         break-glass` on the control plane's host clears them."
    )
}

/// A region of the partition that a device belongs to.
fn home_region(serial: &str) -> &'static str {
    match partition_of(serial) {
        Some("aws-us-gov") => "us-gov-west-1",
        Some("aws-cn") => "cn-north-1",
        Some("aws-eusc") => "eusc-de-east-1",
        Some(_) | None => "us-east-1",
    }
}

/// Tells whether settings protect less than those before.
///
/// Weaker are: a lower level; a plan rule that demands less anywhere; one person where two were
/// demanded; an apply by itself under `never`; more credentials for phases without a code, or
/// other roles that they assume.
pub(super) fn weakens(before: &Settings, after: &Settings) -> bool {
    let reach = |plain: PlainCredentials| match plain {
        PlainCredentials::None => 0,
        PlainCredentials::Session => 1,
        PlainCredentials::Role => 2,
        PlainCredentials::Static => 3,
    };
    after.policy < before.policy
        || !after.plan_rule.is_at_least(&before.plan_rule)
        || (before.second_person && !after.second_person)
        || (after.policy == MfaPolicy::Never && after.auto_apply && !before.auto_apply)
        || reach(after.plain_credentials) > reach(before.plain_credentials)
        || (after.plain_credentials == PlainCredentials::Role && after.roles != before.roles)
}

#[cfg(test)]
mod tests;

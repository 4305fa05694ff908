//! Spends a submitted token code, exactly once.
//!
//! 1. The code must be six ASCII digits; nothing else happens otherwise.
//! 2. The caller must be a person with the right to decide in the run's organization.
//! 3. A `request_id` seen before is answered with what is recorded.
//! 4. The run must wait for a code for this phase, and an apply must be of the plan that the
//!    person was shown.
//! 5. The triple must be complete, its serial usable, its account on the organization's list.
//! 6. One commit counts the attempt, remembers the code's digest and records the attempt as
//!    *spending*. Of any number of submissions of one code, one wins this commit.
//! 7. One call to STS. From here on the code is spent, or its fate is unknown, unless it was
//!    provably never sent.
//! 8. The session is sealed into the record as *verifying*: if this process dies now, a start
//!    goes on from here. An attempt found still *spending* at a start becomes *unknown*.
//! 9. `GetCallerIdentity` must answer a listed account. It may be asked again, and asks nobody
//!    for another code.
//! 10. One commit moves the run, places the session and closes the record, if the person may still
//!     decide.
//!
//! The steps from 4 on run in a task of their own: a caller who hangs up changes nothing, not
//! even between an attempt that is counted and its code.

mod decider;

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::device::{self, Device};
use latchkey_domain::id::{AuthenticationId, Digest, OrganizationId, RunId, UserId};
use latchkey_domain::policy::{Evidence, Phase};
use latchkey_domain::run::{Event, Refusal, RefusedCode, Run};
use latchkey_domain::time::Timestamp;
use latchkey_domain::token_code;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::transition::{Decision, Details, Guard, Subject, of_phase, refused, with_decision};
use super::{App, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::record::authentication::{
    Authentication, DeviceRecord, OpenAuthentication, Outcome, Purpose, RequestRecord, Session,
};
use crate::store::record::{self, Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, keys};
use crate::sts::errors::{About, clock_time, sentence};
use crate::sts::{
    Code, Credentials, Exchange, Identity, Triple, Wanted, account_of, account_of_serial,
};

const ATTEMPTS: usize = 32;

/// How long between two tries of `GetCallerIdentity`.
const IDENTIFY_PAUSE: Duration = Duration::from_secs(2);

/// A submitted code.
#[derive(Debug)]
pub struct Submission {
    pub run: RunId,
    pub phase: Phase,
    pub code: SecretString,
    /// The plan that the person was shown; required for an apply.
    pub seen: Option<Digest>,
    pub request_id: String,
    pub purpose: Purpose,
}

/// An attempt that has been counted and may now be spent.
struct Attempt {
    record: Authentication,
    triple: Triple,
    wanted: Wanted,
    device_key: crate::store::Key,
    digest: device::CodeDigest,
}

impl App {
    pub async fn authenticate_run(
        self: &Arc<Self>,
        caller: &Caller,
        submission: Submission,
    ) -> Result<(Run, AuthenticationId)> {
        token_code::check(submission.code.expose_secret().as_bytes()).map_err(|_| {
            Error::field("token_code", "a token code is exactly six digits; nothing was spent")
        })?;
        let (standing, _) = self.run_for(caller, submission.run, Right::Decide).await?;
        let (user, name) = caller.person()?;
        check_request_id(&submission.request_id)?;
        let space = match submission.purpose {
            Purpose::Phase => "code",
            Purpose::TopUp => "top-up",
        };
        let request = keys::request(
            user,
            &format!("{space}:{}:{}", standing.organization, submission.request_id),
        );
        if let Some(known) = self.fetch::<RequestRecord>(request.clone()).await? {
            return self.recorded(&known.value, &submission).await;
        }
        let (app, name, actor) = (Arc::clone(self), name.to_owned(), standing.caller.audit_name());
        let attempted =
            tokio::spawn(
                async move { app.attempt(user, &name, submission, request, &actor).await },
            );
        attempted.await.map_err(Error::internal)?
    }

    /// Steps 4 to 10.
    async fn attempt(
        self: &Arc<Self>,
        user: UserId,
        name: &str,
        submission: Submission,
        request: crate::store::Key,
        actor: &str,
    ) -> Result<(Run, AuthenticationId)> {
        latchkey_failpoint::reach("cp.code.counting");
        let counted = match self.count_attempt(user, name, &submission, &request).await {
            Ok(counted) => counted,
            // What stands in the way may be this very request, sent before.
            Err(error) => match self.fetch::<RequestRecord>(request).await? {
                Some(known) => return self.recorded(&known.value, &submission).await,
                None => return Err(error),
            },
        };
        latchkey_failpoint::reach("cp.code.counted");
        let Counted::Mine(attempt) = counted else {
            let known = self.fetch::<RequestRecord>(request).await?;
            let known = known.ok_or_else(|| Error::internal("a recorded request vanished"))?;
            return self.recorded(&known.value, &submission).await;
        };
        let id = attempt.record.id.0;
        Arc::clone(self).spend(*attempt, submission.code, actor).await?;
        self.outcome_of(submission.run, id).await
    }

    /// Steps 4 to 6.
    async fn count_attempt(
        self: &Arc<Self>,
        user: UserId,
        name: &str,
        submission: &Submission,
        request: &crate::store::Key,
    ) -> Result<Counted> {
        for _ in 0..ATTEMPTS {
            self.check_history()?;
            let subject = self.subject(submission.run).await?;
            if submission.purpose == Purpose::Phase {
                check_waiting(&subject, submission, name)?;
            }
            self.check_codes_open().await?;
            let run = &subject.run.value;
            let environment = &subject.environment.value;
            let organization = run.request.organization;
            let wanted = self.wanted_by_code(run, environment, submission.phase, name).await?;
            match submission.purpose {
                Purpose::Phase => self.check_above_floor(&wanted, &environment.settings)?,
                Purpose::TopUp => {
                    self.check_top_up(&subject, submission.phase, name, &wanted).await?;
                }
            }
            let triple = self.triple_for(organization, user, &wanted.region).await?;
            self.check_listed(organization, account_of(&triple.access_key_id)).await?;
            let DeviceAttempt { key: device_key, expect, counted, digest } =
                self.device_attempt(&triple, &submission.code).await?;
            let record = Authentication {
                id: Text(AuthenticationId::from_uuid(self.new_id())),
                run: Text(submission.run),
                phase: submission.phase,
                user: name.to_owned(),
                device: triple.serial.clone(),
                access_key_id: triple.access_key_id.clone(),
                seen: submission.seen.map(Text),
                submitted_at: self.now().into(),
                outcome: Outcome::Spending,
                purpose: submission.purpose,
                role: wanted.role.as_ref().map(|role| role.arn.clone()),
                packed_percent: None,
            };
            let known = RequestRecord { run: record.run, authentication: record.id };
            let open = OpenAuthentication { run: record.run };
            let action = match submission.purpose {
                Purpose::Phase => "submit_code",
                Purpose::TopUp => "submit_top_up",
            };
            let draft = self
                .draft(
                    organization,
                    format!("user {name}"),
                    action,
                    format!("run {}", submission.run),
                )
                .with("phase", submission.phase.as_str())
                .with("authentication", record.id.0.to_string())
                .with("device", triple.serial.as_str());
            let batch = Batch::new()
                .put(device_key.clone(), expect, encode(&DeviceRecord::from(&counted)))
                .put(request.clone(), Expect::Absent, encode(&known))
                .put(
                    keys::authentication(record.run.0, record.id.0),
                    Expect::Absent,
                    encode(&record),
                )
                .put(keys::authentication_open(record.id.0), Expect::Absent, encode(&open))
                .audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => {
                    return Ok(Counted::Mine(Box::new(Attempt {
                        record,
                        triple,
                        wanted,
                        device_key,
                        digest,
                    })));
                }
                Err(CommitError::Conflict { key }) if key == *request => {
                    return Ok(Counted::Another);
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(
            Reason::DeviceBusy,
            "too many codes are being submitted for this device at once; try again in a moment",
        ))
    }

    /// Counts an attempt of a device, for the commit that makes it.
    pub(super) async fn device_attempt(
        &self,
        triple: &Triple,
        code: &SecretString,
    ) -> Result<DeviceAttempt> {
        // A device belongs to an account: the serial of a hardware device alone may repeat.
        let account = account_of(&triple.access_key_id)
            .or_else(|| account_of_serial(&triple.serial).map(str::to_owned))
            .unwrap_or_else(|| triple.access_key_id.clone());
        let key = keys::device(&format!("{account}/{}", triple.serial));
        let stored = record::fetch::<DeviceRecord, Device>(&*self.store, key.clone()).await?;
        let (device, expect) = match stored {
            Some(found) => (found.value, Expect::At(found.version)),
            None => (Device::default(), Expect::Absent),
        };
        let digest = self.master.digest(b"token code", code.expose_secret().as_bytes());
        let counted = device.attempt(digest, self.now()).map_err(refused_locally)?;
        Ok(DeviceAttempt { key, expect, counted, digest })
    }

    /// Refuses an account that owners did not list. An account that is not known yet passes: it
    /// is asked for after the exchange.
    pub(super) async fn check_listed(
        &self,
        organization: latchkey_domain::id::OrganizationId,
        account: Option<String>,
    ) -> Result<()> {
        let listed = self.organization(organization).await?.value.aws_accounts;
        if listed.is_empty() {
            return Err(Error::refused(
                Reason::AccountNotListed,
                "the organization lists no AWS account that keys may belong to; an owner does so \
                 with `latchkey org set --aws-account`",
            ));
        }
        match account {
            Some(account) if !listed.contains(&account) => {
                let message = format!(
                    "the access key belongs to the AWS account {account}, which is not on the \
                     organization's list; an owner adds it with `latchkey org set`"
                );
                Err(Error::refused(Reason::AccountNotListed, message).with("account", account))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Steps 7 to 10. Answers once the outcome is recorded.
    async fn spend(
        self: Arc<Self>,
        attempt: Attempt,
        code: SecretString,
        actor: &str,
    ) -> Result<()> {
        let exchange = {
            let code = Code { serial: &attempt.triple.serial, digits: &code };
            self.sts.exchange(&attempt.triple.keys(), Some(code), &attempt.wanted).await
        };
        drop(code);
        latchkey_failpoint::reach("cp.code.answered");
        let Attempt { mut record, wanted, device_key, digest, .. } = attempt;
        let refusal = match exchange {
            Exchange::Issued { credentials, request_id, packed_percent } => {
                let key = keys::authentication(record.run.0, record.id.0);
                record.packed_percent = packed_percent;
                record.outcome = Outcome::Verifying {
                    session: self.seal_session(&key, &credentials),
                    // What STS issues has one; if it ever had none, it would be of no use.
                    expires_at: credentials.expires_at.unwrap_or(self.now()).into(),
                    aws_request_id: request_id,
                };
                let batch = Batch::new().put(key, Expect::Anything, encode(&record));
                self.store.commit(batch).await?;
                return self.verify(record, credentials, &wanted.region, actor).await;
            }
            Exchange::Refused(refused) => {
                let next_window = Some(Device::next_window(self.now()));
                let about = About { wanted: &wanted, next_window };
                let (reason, message) = sentence(&refused, about);
                (reason, message, refused.request_id)
            }
            Exchange::Unknown { request_id } => {
                (Reason::ExchangeUnknown, unknown_sentence(), request_id)
            }
            Exchange::NotReached => {
                self.give_back(&device_key, digest).await?;
                let message = "AWS could not be reached; the code was not sent and is still good. \
                               Try again."
                    .to_owned();
                let refusal = (Reason::AwsUnreachable, message, None);
                return self.record_refusal(record, &refusal, actor).await;
            }
        };
        self.refuse(record, refusal, actor).await
    }

    /// Closes a record without a word to the run: the code was not refused, or the run has moved
    /// on.
    pub(super) async fn record_refusal(
        &self,
        mut record: Authentication,
        (reason, message, aws_request_id): &(Reason, String, Option<String>),
        actor: &str,
    ) -> Result<()> {
        record.outcome = Outcome::Refused {
            reason: reason.name().to_owned(),
            message: message.clone(),
            aws_request_id: aws_request_id.clone(),
            at: self.now().into(),
        };
        let run = self.run(record.run.0).await?.value;
        let subject = format!("run {}", run.id);
        let draft = self.draft(run.request.organization, actor, "refuse_code", subject);
        let draft = details(&record)
            .into_iter()
            .fold(draft, |draft, (name, value)| draft.with(name, value));
        self.store.commit(close(Batch::new(), &record).audit(draft)).await?;
        Ok(())
    }

    /// Frees a code that was provably never sent. The attempt stays counted.
    pub(super) async fn give_back(
        &self,
        device_key: &crate::store::Key,
        digest: device::CodeDigest,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let found: Option<Loaded<Device>> =
                record::fetch::<DeviceRecord, _>(&*self.store, device_key.clone()).await?;
            let Some(found) = found else { return Ok(()) };
            let freed = DeviceRecord::from(&found.value.forget(digest));
            let batch = Batch::new().put(found.key, Expect::At(found.version), encode(&freed));
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Steps 9 and 10; a start calls it again for what it finds *verifying*.
    async fn verify(
        self: &Arc<Self>,
        record: Authentication,
        session: Credentials,
        region: &str,
        actor: &str,
    ) -> Result<()> {
        let organization = self.run(record.run.0).await?.value.request.organization;
        loop {
            match self.decider(&record).await {
                Ok(_) => {}
                Err(error) if is_refusal(error.reason()) => {
                    let refusal = (error.reason(), error.message().to_owned(), None);
                    return self.refuse(record, refusal, actor).await;
                }
                Err(error) => return Err(error),
            }
            let refusal = match self.sts.identify(&session, region).await {
                Identity::Account(account) => {
                    match self.check_whose(organization, &record, &account).await {
                        Ok(()) => return self.accept(record, &session, account, actor).await,
                        Err(error) if error.reason() == Reason::AccountNotListed => {
                            (error.reason(), error.message().to_owned(), None)
                        }
                        Err(error) => return Err(error),
                    }
                }
                Identity::Refused(refused) => {
                    let wanted =
                        Wanted { region: region.to_owned(), duration: Duration::ZERO, role: None };
                    let about = About { wanted: &wanted, next_window: None };
                    let (reason, message) = sentence(&refused, about);
                    (reason, message, refused.request_id)
                }
                Identity::Unavailable if session.expires_at.is_some_and(|at| at > self.now()) => {
                    tracing::warn!(
                        authentication_id = %record.id.0,
                        "AWS does not tell whose session it is; asking again"
                    );
                    tokio::time::sleep(IDENTIFY_PAUSE).await;
                    continue;
                }
                Identity::Unavailable => {
                    let message = "AWS never told whose session it issued; use a new code";
                    (Reason::ExchangeUnknown, message.to_owned(), None)
                }
            };
            return self.refuse(record, refusal, actor).await;
        }
    }

    /// Checks that a session is of an account that may be used for what its code was meant for.
    async fn check_whose(
        &self,
        organization: OrganizationId,
        record: &Authentication,
        account: &str,
    ) -> Result<()> {
        self.check_account(organization, &record.kind(), account).await?;
        match record.purpose {
            Purpose::Phase => Ok(()),
            Purpose::TopUp => self.check_same_account(record, account).await,
        }
    }

    /// Step 10, for a session that may be used.
    async fn accept(
        self: &Arc<Self>,
        mut record: Authentication,
        session: &Credentials,
        account: String,
        actor: &str,
    ) -> Result<()> {
        let now = self.now();
        let (expires_at, aws_request_id) = match &record.outcome {
            Outcome::Verifying { aws_request_id, expires_at, .. } => {
                ((*expires_at).into(), aws_request_id.clone())
            }
            Outcome::Spending | Outcome::Accepted { .. } | Outcome::Refused { .. } => (now, None),
        };
        let (run, id) = (record.run.0, record.id.0);
        record.outcome =
            Outcome::Accepted { expires_at: expires_at.into(), aws_request_id, at: now.into() };
        let place = keys::session(run, record.phase);
        let waiting = Session {
            authentication: Some(record.id),
            credentials: self.seal_session(&place, session),
            expires_at: Some(expires_at.into()),
            kind: Some(record.kind()),
            account: Some(account),
        };
        let evidence = Evidence {
            authentication: id,
            phase: record.phase,
            user: record.user.clone(),
            authenticated_at: now,
            expires_at,
        };
        let action = match record.purpose {
            Purpose::Phase => "authenticate_run",
            Purpose::TopUp => "top_up",
        };
        let decider = self.decider(&record).await;
        let advance = async |user| {
            let guard = Guard::Decider(user);
            self.advance_guarded(run, guard, (actor, action), |subject| {
                let event = match record.purpose {
                    Purpose::Phase => Event::CodeAccepted {
                        evidence: evidence.clone(),
                        seen: record.seen.map(|seen| seen.0),
                        current: subject.environment.value.settings.demands(),
                    },
                    Purpose::TopUp => Event::ToppedUp {
                        evidence: evidence.clone(),
                        current: subject.environment.value.settings.demands(),
                    },
                };
                let batch = close(Batch::new(), &record).put(
                    place.clone(),
                    Expect::Anything,
                    encode(&waiting),
                );
                Ok(Decision { event, batch, details: details(&record) })
            })
            .await
        };
        let accepted = match decider {
            Ok(user) => advance(user).await,
            Err(error) => Err(error),
        };
        match accepted {
            Ok(_) => Ok(()),
            Err(error) if is_refusal(error.reason()) => {
                // The run moved on while AWS answered, or the right is gone: the session serves
                // nobody.
                let refusal = (error.reason(), error.message().to_owned(), None);
                self.refuse(record, refusal, actor).await
            }
            Err(error) => Err(error),
        }
    }

    /// Step 10, for a code that bought nothing: the lock turns red, the run goes on waiting.
    async fn refuse(
        self: &Arc<Self>,
        mut record: Authentication,
        refusal: (Reason, String, Option<String>),
        actor: &str,
    ) -> Result<()> {
        if record.purpose == Purpose::TopUp {
            // The run waits for nothing: it goes on with what it has.
            return self.record_refusal(record, &refusal, actor).await;
        }
        let (reason, message, aws_request_id) = refusal.clone();
        let now = self.now();
        record.outcome = Outcome::Refused {
            reason: reason.name().to_owned(),
            message: message.clone(),
            aws_request_id: aws_request_id.clone(),
            at: now.into(),
        };
        let refused = RefusedCode {
            authentication: record.id.0,
            reason: reason.name().to_owned(),
            message,
            at: now,
            aws_request_id,
        };
        let advance = self
            .advance_with(record.run.0, actor, "refuse_code", |subject| {
                let event = Event::CodeRefused {
                    phase: record.phase,
                    refused: refused.clone(),
                    current: subject.environment.value.settings.demands(),
                };
                let batch = close(Batch::new(), &record);
                Ok(Decision { event, batch, details: details(&record) })
            })
            .await;
        match advance {
            Ok(_) => Ok(()),
            Err(error) if is_refusal(error.reason()) => {
                // The run waits no more; the record is closed all the same.
                self.record_refusal(record, &refusal, actor).await
            }
            Err(error) => Err(error),
        }
    }

    /// At a start: what was being spent is unknown, what was being verified is verified.
    pub async fn settle_authentications(self: &Arc<Self>) -> Result<()> {
        for (key, found) in self.list(keys::authentications_open()).await? {
            let Some(id) = key.last_id().map(AuthenticationId::from_bytes) else { continue };
            let open: OpenAuthentication = decode(&key, &found)?;
            let record_key = keys::authentication(open.run.0, id);
            let Some(record) = self.fetch::<Authentication>(record_key.clone()).await? else {
                continue;
            };
            let record = record.value;
            match record.outcome.clone() {
                Outcome::Spending => {
                    let refusal = (Reason::ExchangeUnknown, unknown_sentence(), None);
                    self.refuse(record, refusal, "system").await?;
                }
                Outcome::Verifying { session, .. } => {
                    let session = self.open_session(&record_key, &session)?;
                    let subject = self.subject(open.run.0).await?;
                    let (run, environment) = (subject.run.value, subject.environment.value);
                    let region = of_phase(&environment, &run, record.phase).settings.region;
                    let app = Arc::clone(self);
                    tokio::spawn(async move {
                        let actor = format!("user {}", record.user);
                        if let Err(error) = app.verify(record, session, &region, &actor).await {
                            tracing::error!(authentication_id = %id, error = %error,
                                "a session was not verified");
                        }
                    });
                }
                Outcome::Accepted { .. } | Outcome::Refused { .. } => {
                    let batch = Batch::new().delete(key, Expect::Anything);
                    self.store.commit(batch).await?;
                }
            }
        }
        Ok(())
    }

    async fn recorded(
        &self,
        known: &RequestRecord,
        submission: &Submission,
    ) -> Result<(Run, AuthenticationId)> {
        let other = |what: &str| {
            let message = format!("it was used for a code of another {what}; give a new one");
            Err(Error::field("request_id", message))
        };
        if known.run.0 != submission.run {
            return other("run");
        }
        let key = keys::authentication(known.run.0, known.authentication.0);
        let mut feed = self.store.watch(keys::exactly(&key));
        loop {
            let found: Option<Loaded<Authentication>> = self.fetch(key.clone()).await?;
            if let Some(found) = &found {
                if found.value.phase != submission.phase {
                    return other("phase");
                }
                if found.value.seen.map(|seen| seen.0) != submission.seen {
                    return other("plan");
                }
            }
            if found.is_none_or(|found| !found.value.outcome.is_open()) {
                return self.outcome_of(known.run.0, known.authentication.0).await;
            }
            feed.next().await;
        }
    }

    /// Answers what is recorded of an attempt, as a success or as its refusal.
    async fn outcome_of(
        &self,
        run: RunId,
        id: AuthenticationId,
    ) -> Result<(Run, AuthenticationId)> {
        let found: Loaded<Authentication> = self
            .fetch(keys::authentication(run, id))
            .await?
            .ok_or_else(|| Error::not_found("authentication"))?;
        match found.value.outcome {
            Outcome::Accepted { .. } => Ok((self.run(run).await?.value, id)),
            Outcome::Refused { reason, message, aws_request_id, .. } => {
                let reason = Reason::from_str_name(&format!("REASON_{reason}"))
                    .unwrap_or(Reason::ExchangeRefused);
                let mut error =
                    Error::refused(reason, message).with("authentication_id", id.to_string());
                // Who may no longer see the run is told nothing of it.
                if is_refusal(reason) && reason != Reason::NotAllowed {
                    error = with_decision(error, &self.run(run).await?.value);
                }
                if let Some(request_id) = aws_request_id {
                    error = error.with("aws_request_id", request_id);
                }
                Err(error)
            }
            Outcome::Spending | Outcome::Verifying { .. } => {
                Err(Error::internal("an attempt was answered before it had an outcome"))
            }
        }
    }
}

/// An attempt of a device as it is to be committed.
pub(super) struct DeviceAttempt {
    pub(super) key: crate::store::Key,
    pub(super) expect: Expect,
    pub(super) counted: Device,
    pub(super) digest: device::CodeDigest,
}

/// Who won the commit of step 6.
enum Counted {
    Mine(Box<Attempt>),
    /// The same request, submitted at the same time.
    Another,
}

fn close(batch: Batch, record: &Authentication) -> Batch {
    batch
        .put(keys::authentication(record.run.0, record.id.0), Expect::Anything, encode(record))
        .delete(keys::authentication_open(record.id.0), Expect::Anything)
}

/// What the audit record of an outcome tells.
fn details(record: &Authentication) -> Details {
    let mut details = vec![
        ("phase", record.phase.as_str().into()),
        ("authentication", record.id.0.to_string().into()),
        ("device", record.device.as_str().into()),
    ];
    let aws_request_id = match &record.outcome {
        Outcome::Spending | Outcome::Verifying { .. } => &None,
        Outcome::Accepted { aws_request_id, .. } => aws_request_id,
        Outcome::Refused { reason, aws_request_id, .. } => {
            details.push(("refusal", reason.as_str().into()));
            aws_request_id
        }
    };
    details.extend(record.role.as_deref().map(|role| ("role", role.into())));
    details.extend(record.packed_percent.map(|percent| ("packed_policy_percent", percent.into())));
    if let Some(aws_request_id) = aws_request_id {
        details.push(("aws_request_id", aws_request_id.as_str().into()));
    }
    details
}

fn is_refusal(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NotAwaitingCode
            | Reason::WrongState
            | Reason::PlanChanged
            | Reason::SecondPersonRequired
            | Reason::NotAllowed
    )
}

pub(super) fn unknown_sentence() -> String {
    "Whether AWS accepted this code is not known, so it will not be used. Use the next code.".into()
}

/// Step 4.
fn check_waiting(subject: &Subject, submission: &Submission, name: &str) -> Result<()> {
    let run = &subject.run.value;
    let current = subject.environment.value.settings.demands();
    let awaited = run.awaits_code(&current);
    if awaited != Some(submission.phase) {
        let Some(phase) = awaited else {
            return Err(refused(Refusal::NotAwaitingCode, run));
        };
        let message = format!("the run waits for a token code for its {phase}");
        return Err(with_decision(Error::refused(Reason::NotAwaitingCode, message), run));
    }
    if submission.phase == Phase::Apply {
        if !run.may_be_approved_by(name, &current) {
            return Err(Refusal::SecondPersonRequired.into());
        }
        let planned = run.planned.as_ref().map(|planned| planned.digest);
        if submission.seen.is_none() {
            let message = "give the digest of the plan that you were shown (`Plan.digest`)";
            return Err(Error::field("plan_digest", message));
        }
        if submission.seen != planned {
            return Err(Refusal::PlanChanged.into());
        }
    }
    Ok(())
}

fn refused_locally(refused: device::Refused) -> Error {
    match refused {
        device::Refused::CodeUsed => Error::refused(
            Reason::CodeUsed,
            "this code was submitted before and is good only once; use the next one",
        ),
        device::Refused::Busy { retry_at } => Error::refused(
            Reason::DeviceBusy,
            format!(
                "five codes were tried for this device in the current three minutes; AWS would \
                 block it after a few more. Use a new code from {} on",
                clock_time(retry_at)
            ),
        )
        .with("retry_at", rfc3339(retry_at)),
    }
}

pub(super) fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.as_millis())
        .map_or_else(|_| String::new(), |t| t.to_string())
}

#[cfg(test)]
mod tests;

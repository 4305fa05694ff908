//! A change by a code: counted, spent once, made. Steps 3 to 6 of [`super`].

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::device::{CodeDigest, Device};
use latchkey_domain::id::{AuthenticationId, OrganizationId, UserId};
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::record::{ChangeOutcome, ChangeRecord, OpenChange, Refusal, request_key, request_text};
use super::{ATTEMPTS, Backing, GivenCode, Intent, Round, too_fast};
use crate::app::App;
use crate::app::authenticate_run::{DeviceAttempt, unknown_sentence};
use crate::error::{Error, Result};
use crate::store::record::authentication::DeviceRecord;
use crate::store::record::{Text, encode};
use crate::store::{Batch, CommitError, Expect, Key, keys};
use crate::sts::errors::{About, sentence};
use crate::sts::{Code, Credentials, Exchange, Identity, Triple, Wanted, account_of, partition_of};

const IDENTIFY_ATTEMPTS: u32 = 5;
const IDENTIFY_PAUSE: Duration = Duration::from_secs(2);

/// The shortest session that AWS issues.
const SESSION: Duration = Duration::from_secs(15 * 60);

impl App {
    /// Steps 3 to 6.
    pub(super) async fn change_by_code(
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
            let guard = self.guard_of_change(intent, user, true).await?;
            let triple = guard.triple.ok_or_else(|| {
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
            let more = |batch: Batch| {
                batch
                    .put(request.clone(), Expect::Anything, encode(&made))
                    .delete(keys::change_open(record.id.0), Expect::Anything)
                    .audit(draft)
            };
            match self.try_change(intent, Backing::Code, vec![], more).await? {
                Round::Made => return Ok(()),
                Round::Lost => {}
            }
        }
        Err(too_fast())
    }
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

//! The doctor: tries an environment's AWS set-up step by step and says what to fix.
//!
//! 1. What is known without AWS: the triple is whole, its serial can be one, all is in one
//!    partition, the account is listed.
//! 2. Calls that spend nothing: the long-term keys say who they are.
//! 3. If a code was given and nothing has failed so far: it is counted, remembered and spent as
//!    any other, exactly once, on a session that lives as long as a run's would.
//! 4. For each role that the modes use: it is assumed with what a run would say, for as long as a
//!    run would ask; where its trust demands MFA, with the session of step 3. What is issued is
//!    dropped at once.
//!
//! With a code the whole runs in a task of its own, and a repeat is answered from the record.

mod roles;

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::device::Device;
use latchkey_domain::id::UserId;
use latchkey_domain::policy::{MfaPolicy, PlanRule};
use latchkey_domain::token_code;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::authenticate_run::{DeviceAttempt, unknown_sentence};
use super::credentials::session_wanted;
use super::secrets::{check_device, check_partition};
use super::{App, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::record::authentication::DeviceRecord;
use crate::store::record::check::{CheckOutcome, CheckRecord, CheckStep};
use crate::store::record::environment::{CodeCredentials, Environment, PlainCredentials};
use crate::store::record::{Text, encode};
use crate::store::{Batch, CommitError, Expect, Key, keys};
use crate::sts::errors::{About, sentence};
use crate::sts::{
    Code, Credentials, Exchange, Identity, Triple, Wanted, account_of, account_of_serial,
    partition_of, partition_of_region,
};

const ATTEMPTS: usize = 32;

/// What the session of a code lives here: the least that AWS issues.
const SHORTEST: Duration = Duration::from_secs(900);

/// A check that was asked for.
#[derive(Debug)]
pub struct Check {
    pub organization: String,
    pub environment: String,
    pub code: Option<SecretString>,
    /// Required with a code.
    pub request_id: String,
}

/// Who asks, about what.
struct Asked {
    user: UserId,
    name: String,
    actor: String,
    environment: Environment,
    /// Where a check with a code is recorded.
    request: Option<Key>,
}

/// What became of a code.
#[derive(Default)]
struct Spent {
    /// The attempt is recorded under this request.
    counted: bool,
    session: Option<Credentials>,
}

/// What was found so far.
#[derive(Default)]
struct Findings(Vec<CheckStep>);

impl Findings {
    fn add(&mut self, name: &str, outcome: CheckOutcome, sentence: String, remedy: &str) {
        let (name, remedy) = (name.to_owned(), remedy.to_owned());
        self.0.push(CheckStep { name, outcome, sentence, remedy });
    }

    fn ok(&mut self, name: &str, sentence: impl Into<String>) {
        self.add(name, CheckOutcome::Ok, sentence.into(), "");
    }

    fn failed(&mut self, name: &str, sentence: impl Into<String>, remedy: &str) {
        self.add(name, CheckOutcome::Failed, sentence.into(), remedy);
    }

    fn skipped(&mut self, name: &str, sentence: impl Into<String>) {
        self.add(name, CheckOutcome::Skipped, sentence.into(), "");
    }

    /// A check of ours that refuses with a sentence that holds its remedy.
    fn judged(&mut self, name: &str, result: Result<()>, ok: impl Into<String>) -> Result<bool> {
        match result {
            Ok(()) => {
                self.ok(name, ok);
                Ok(true)
            }
            Err(error) if is_finding(error.reason()) => {
                self.failed(name, error.message(), "");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn have_failed(&self) -> bool {
        self.0.iter().any(|step| step.outcome == CheckOutcome::Failed)
    }
}

/// Tells a finding about the set-up from a failure of our own.
fn is_finding(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::TripleIncomplete
            | Reason::SerialUnusable
            | Reason::AccountNotListed
            | Reason::ExchangeRefused
            | Reason::CodeUsed
            | Reason::DeviceBusy
    )
}

impl App {
    pub async fn check_environment(
        self: &Arc<Self>,
        caller: &Caller,
        check: Check,
    ) -> Result<Vec<CheckStep>> {
        if let Some(code) = &check.code {
            token_code::check(code.expose_secret().as_bytes()).map_err(|_| {
                let message = "a token code is exactly six digits; nothing was spent";
                Error::field("token_code", message)
            })?;
        }
        let Check { organization, environment, code, request_id } = check;
        let (standing, found) = self.on(caller, &organization, &environment, Right::Decide).await?;
        let (user, name) = caller.person()?;
        let environment = found.value;
        let mut request = None;
        if code.is_some() {
            check_request_id(&request_id)?;
            let key = keys::request(user, &format!("check:{}:{request_id}", standing.organization));
            if let Some(known) = self.fetch::<CheckRecord>(key.clone()).await? {
                return recorded(known.value, &environment);
            }
            request = Some(key);
        }
        let asked =
            Asked { user, name: name.to_owned(), actor: caller.audit_name(), environment, request };
        let app = Arc::clone(self);
        tokio::spawn(async move { app.examine(asked, code).await })
            .await
            .map_err(Error::internal)?
    }

    async fn examine(&self, asked: Asked, code: Option<SecretString>) -> Result<Vec<CheckStep>> {
        let mut findings = Findings::default();
        let with_code = code.is_some();
        let triple = self.examine_triple(&asked, with_code, &mut findings).await?;
        let Spent { counted, session } = match (&triple, code) {
            (Some(triple), Some(code)) => {
                self.examine_device(&asked, triple, code, &mut findings).await?
            }
            (None, Some(_)) => {
                findings.skipped("device", "without the triple the code was not spent");
                Spent::default()
            }
            (_, None) => {
                findings.skipped("device", "no code was given");
                Spent::default()
            }
        };
        let plain_keys = self.examine_plain_keys(&asked, triple.as_ref(), &mut findings).await?;
        self.examine_roles(&asked, triple.as_ref(), plain_keys.as_ref(), session, &mut findings)
            .await?;

        let Asked { environment, actor, request, .. } = asked;
        let subject = format!("environment {}", environment.name);
        let steps = findings.0.iter();
        let steps: Vec<_> =
            steps.map(|step| format!("{}: {}", step.name, step.outcome.as_str())).collect();
        let draft = self
            .draft(environment.organization, actor, "check_environment", subject)
            .with("steps", steps);
        let batch = Batch::new().audit(draft);
        let Some(request) = request else {
            self.store.commit(batch).await?;
            return Ok(findings.0);
        };
        let steps = Some(findings.0.clone());
        let record = CheckRecord { environment: Text(environment.id), steps };
        // The same request, made twice at once, may have its code counted by the other.
        let expect = if counted { Expect::Anything } else { Expect::Absent };
        match self.store.commit(batch.put(request.clone(), expect, encode(&record))).await {
            Ok(_) => Ok(findings.0),
            Err(CommitError::Conflict { key }) if key == request => {
                let known = self.fetch::<CheckRecord>(request).await?;
                recorded(known.ok_or_else(under_way)?.value, &environment)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Steps 1 and 2. Answers the triple where it is whole and AWS knows its keys.
    async fn examine_triple(
        &self,
        asked: &Asked,
        with_code: bool,
        findings: &mut Findings,
    ) -> Result<Option<Triple>> {
        let environment = &asked.environment;
        let settings = &environment.settings;
        let organization = environment.organization;
        let (triple, which) = match self.whole_triple(organization, asked.user).await {
            Ok(found) => found,
            Err(error) if error.reason() == Reason::TripleIncomplete => {
                let rule = settings.plan_rule != PlanRule::default();
                if !with_code && settings.policy == MfaPolicy::Never && !rule {
                    let message = format!("no code is demanded here; {}", error.message());
                    findings.skipped("triple", message);
                } else {
                    findings.failed("triple", error.message(), "");
                }
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        findings.ok("triple", format!("access key, secret key and serial are in {which}"));
        let serial = check_device(&triple.serial, which);
        findings.judged("serial", serial, format!("{} can be a device", triple.serial))?;
        let region = &settings.region;
        let partition = check_partition(&triple.serial, which, region).and_then(|()| {
            let expected = partition_of_region(region);
            let arns = [&settings.roles.plan.arn, &settings.roles.apply.arn];
            match arns.into_iter().find(|arn| partition_of(arn).is_some_and(|p| p != expected)) {
                Some(arn) => {
                    let message = format!(
                        "the role {arn} is not in the partition {expected} of the region {region}; \
                         set another role or region with `latchkey env set`"
                    );
                    Err(Error::refused(Reason::ExchangeRefused, message))
                }
                None => Ok(()),
            }
        });
        let fits = format!("all of it is in {}, as {region} is", partition_of_region(region));
        findings.judged("partition", partition, fits)?;

        let identity = self.sts.identify(&triple.keys(), region).await;
        let by_id = account_of(&triple.access_key_id)
            .or_else(|| account_of_serial(&triple.serial).map(str::to_owned));
        let account = match &identity {
            Identity::Account(account) => Some(account.clone()),
            Identity::Unavailable | Identity::Refused(_) => by_id,
        };
        match account {
            Some(account) => {
                let listed = self.check_listed(organization, Some(account.clone())).await;
                let ok = format!("the account {account} is on the organization's list");
                findings.judged("account", listed, ok)?;
            }
            None => findings.skipped("account", "the keys do not tell their account"),
        }
        Ok(self.told_of_keys("keys", identity, settings, findings).then_some(triple))
    }

    /// Says what AWS said of long-term keys; whether it knows them.
    fn told_of_keys(
        &self,
        name: &str,
        identity: Identity,
        settings: &crate::store::record::environment::Settings,
        findings: &mut Findings,
    ) -> bool {
        match identity {
            Identity::Account(account) => {
                findings.ok(name, format!("AWS knows the keys, in the account {account}"));
                true
            }
            Identity::Refused(refused) => {
                let wanted = session_wanted(settings);
                let about = About { wanted: &wanted, next_window: None };
                findings.failed(name, sentence(&refused, about).1, "");
                false
            }
            Identity::Unavailable => {
                let message = format!("AWS STS in {} did not answer", settings.region);
                let remedy = "try again; if it stays so, the operator should look at the control \
                              plane's way to AWS";
                findings.failed(name, message, remedy);
                false
            }
        }
    }

    /// What phases without a code are given something of.
    async fn examine_plain_keys(
        &self,
        asked: &Asked,
        triple: Option<&Triple>,
        findings: &mut Findings,
    ) -> Result<Option<Credentials>> {
        let settings = &asked.environment.settings;
        let organization = asked.environment.organization;
        if settings.plain_credentials == PlainCredentials::None {
            return Ok(None);
        }
        let keys = match self.organization_keys(organization).await {
            Ok(Some(keys)) => keys.keys(),
            Ok(None) => {
                let message = "the organization has no keys: phases that demand no code get no \
                               credentials";
                findings.skipped("plain_keys", message);
                return Ok(None);
            }
            Err(error) if is_finding(error.reason()) => {
                findings.failed("plain_keys", error.message(), "");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if triple.is_some_and(|triple| triple.access_key_id == keys.access_key_id) {
            return Ok(Some(keys));
        }
        let identity = self.sts.identify(&keys, &settings.region).await;
        let known = self.told_of_keys("plain_keys", identity, settings, findings);
        Ok(known.then_some(keys))
    }

    /// Step 3: spends the code, unless what was found so far says that it would be wasted.
    async fn examine_device(
        &self,
        asked: &Asked,
        triple: &Triple,
        code: SecretString,
        findings: &mut Findings,
    ) -> Result<Spent> {
        if findings.have_failed() {
            let message = "the code was not spent: what failed above comes first";
            findings.skipped("device", message);
            return Ok(Spent::default());
        }
        let settings = &asked.environment.settings;
        let duration = match settings.code_credentials {
            CodeCredentials::Session => settings.session_duration,
            CodeCredentials::Role => SHORTEST,
        };
        let wanted = Wanted { region: settings.region.clone(), duration, role: None };
        let (device_key, digest) = match self.count_check(asked, triple, &code).await {
            Ok(Some(counted)) => counted,
            Ok(None) => return Err(under_way()),
            Err(error) if is_finding(error.reason()) => {
                findings.failed("device", error.message(), "");
                return Ok(Spent::default());
            }
            Err(error) => return Err(error),
        };
        let mut spent = Spent { counted: true, session: None };
        let exchange = {
            let code = Code { serial: &triple.serial, digits: &code };
            self.sts.exchange(&triple.keys(), Some(code), &wanted).await
        };
        drop(code);
        match exchange {
            Exchange::Issued { credentials, .. } => {
                let message =
                    format!("the device {} accepted the code, which is spent", triple.serial);
                findings.ok("device", message);
                spent.session = Some(credentials);
            }
            Exchange::Refused(refused) => {
                let next_window = Some(Device::next_window(self.now()));
                let about = About { wanted: &wanted, next_window };
                findings.failed("device", sentence(&refused, about).1, "");
            }
            Exchange::Unknown { .. } => findings.failed("device", unknown_sentence(), ""),
            Exchange::NotReached => {
                self.give_back(&device_key, digest).await?;
                let message = "AWS could not be reached; the code was not sent and is still good";
                findings.failed("device", message, "try again");
            }
        }
        Ok(spent)
    }

    /// Counts the attempt and remembers the code, before it is sent. `None` where the same request
    /// has been counted.
    async fn count_check(
        &self,
        asked: &Asked,
        triple: &Triple,
        code: &SecretString,
    ) -> Result<Option<(Key, latchkey_domain::device::CodeDigest)>> {
        let environment = &asked.environment;
        for _ in 0..ATTEMPTS {
            self.check_history()?;
            self.check_codes_open().await?;
            let DeviceAttempt { key, expect, counted, digest } =
                self.device_attempt(triple, code).await?;
            let subject = format!("environment {}", environment.name);
            let draft = self
                .draft(environment.organization, asked.actor.as_str(), "submit_check_code", subject)
                .with("device", triple.serial.as_str());
            let mut batch = Batch::new()
                .put(key.clone(), expect, encode(&DeviceRecord::from(&counted)))
                .audit(draft);
            if let Some(request) = &asked.request {
                let record = CheckRecord { environment: Text(environment.id), steps: None };
                batch = batch.put(request.clone(), Expect::Absent, encode(&record));
            }
            match self.store.commit(batch).await {
                Ok(_) => return Ok(Some((key, digest))),
                Err(CommitError::Conflict { key }) if Some(&key) == asked.request.as_ref() => {
                    return Ok(None);
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
}

fn recorded(known: CheckRecord, environment: &Environment) -> Result<Vec<CheckStep>> {
    if known.environment.0 != environment.id {
        let message = "it was used for a check of another environment; give a new one";
        return Err(Error::field("request_id", message));
    }
    known.steps.ok_or_else(under_way)
}

fn under_way() -> Error {
    Error::refused(
        Reason::CodeUsed,
        "this check is under way, or was cut off after its code was spent; use a new code",
    )
}

#[cfg(test)]
mod tests;

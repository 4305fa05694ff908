//! What is sealed inside records: variables' values, session credentials, triples.

use latchkey_domain::id::{OrganizationId, RunId, UserId};
use latchkey_domain::policy::Phase;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::App;
use crate::error::{Error, Result};
use crate::seal;
use crate::store::keys::VariableScope;
use crate::store::record::authentication::Session;
use crate::store::record::variable::{Category, Variable, stored_name};
use crate::store::record::{Loaded, Millis, SealedBytes};
use crate::store::{Key, keys};
use crate::sts::{Credentials, Triple, check_serial, partition_of, partition_of_region};

pub(super) const ACCESS_KEY: &str = "AWS_ACCESS_KEY_ID";
pub(super) const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
/// As Atlas called it.
pub(super) const SERIAL: &str = "AWS_MFA_SERIAL_NUMBER";
pub(super) const TRIPLE: [&str; 3] = [ACCESS_KEY, SECRET_KEY, SERIAL];

/// Session credentials as they are sealed.
#[derive(Serialize, Deserialize)]
struct SealedSession {
    access_key_id: String,
    secret_access_key: Zeroizing<String>,
    session_token: Option<Zeroizing<String>>,
    expires_at: Option<Millis>,
}

impl App {
    pub(super) fn seal_value(&self, record: &Key, value: &SecretString) -> SealedBytes {
        let context = seal::context("value", record);
        SealedBytes(self.master.seal(&context, value.expose_secret().as_bytes()))
    }

    pub(super) fn open_value(&self, record: &Key, sealed: &SealedBytes) -> Result<SecretString> {
        let context = seal::context("value", record);
        let opened = self.master.open_sealed(&context, &sealed.0).map_err(Error::internal)?;
        opened.into_text().ok_or_else(|| Error::internal("a sealed value is not text"))
    }

    /// Seals a session for the place it will wait in.
    pub(super) fn seal_session(&self, place: &Key, session: &Credentials) -> SealedBytes {
        let plain = SealedSession {
            access_key_id: session.access_key_id.clone(),
            secret_access_key: session.secret_access_key.expose_secret().to_owned().into(),
            session_token: session
                .session_token
                .as_ref()
                .map(|token| token.expose_secret().to_owned().into()),
            expires_at: session.expires_at.map(Millis::from),
        };
        let json = Zeroizing::new(serde_json::to_vec(&plain).expect("strings serialize"));
        SealedBytes(self.master.seal(&seal::context("session", place), &json))
    }

    pub(super) fn open_session(&self, place: &Key, sealed: &SealedBytes) -> Result<Credentials> {
        let context = seal::context("session", place);
        let opened = self.master.open_sealed(&context, &sealed.0).map_err(Error::internal)?;
        let plain: SealedSession = serde_json::from_slice(opened.expose_secret())
            .map_err(|_| Error::internal("a sealed session is malformed"))?;
        Ok(Credentials {
            access_key_id: plain.access_key_id,
            secret_access_key: plain.secret_access_key.as_str().into(),
            session_token: plain.session_token.map(|token| token.as_str().into()),
            expires_at: plain.expires_at.map(Timestamp::from),
        })
    }

    /// Returns the session that was released for a phase.
    pub(super) async fn session_of(&self, run: RunId, phase: Phase) -> Result<Option<Credentials>> {
        let key = keys::session(run, phase);
        let Some(found) = self.fetch::<Session>(key.clone()).await? else { return Ok(None) };
        self.open_session(&key, &found.value.credentials).map(Some)
    }

    /// Finds the triple a person's code is spent with: their own, else the organization's.
    pub(super) async fn triple_for(
        &self,
        organization: OrganizationId,
        user: UserId,
        region: &str,
    ) -> Result<Triple> {
        let (triple, which) = self.whole_triple(organization, user).await?;
        check_device(&triple.serial, which)?;
        check_partition(&triple.serial, which, region)?;
        Ok(triple)
    }

    /// Finds all three parts, and says whose they are. What they say is not looked at.
    pub(super) async fn whole_triple(
        &self,
        organization: OrganizationId,
        user: UserId,
    ) -> Result<(Triple, &'static str)> {
        let own = VariableScope::Personal(organization, user);
        let (scope, which) = match self.any_of_triple(own).await? {
            true => (own, "your personal variables"),
            false => (VariableScope::Organization(organization), "the organization's variables"),
        };
        let mut values = vec![];
        let mut missing = vec![];
        for name in TRIPLE {
            match self.triple_value(scope, name).await? {
                Some(value) => values.push(value),
                None => missing.push(name),
            }
        }
        let Ok([access_key, secret_key, serial]) = <[SecretString; 3]>::try_from(values) else {
            let missing = missing.join(", ");
            let message = format!(
                "{missing} missing in {which}; set with `latchkey var set NAME --env-var \
                 --personal` for yourself or `--organization-wide` for everyone"
            );
            return Err(Error::refused(Reason::TripleIncomplete, message).with("missing", missing));
        };
        let triple = Triple {
            access_key_id: access_key.expose_secret().to_owned(),
            secret_access_key: secret_key,
            serial: serial.expose_secret().to_owned(),
        };
        Ok((triple, which))
    }

    /// Finds the organization's long-term keys, for a session without a code. `None` when it
    /// has none at all.
    pub(super) async fn organization_keys(
        &self,
        organization: OrganizationId,
    ) -> Result<Option<Triple>> {
        let scope = VariableScope::Organization(organization);
        let access_key = self.triple_value(scope, ACCESS_KEY).await?;
        let secret_key = self.triple_value(scope, SECRET_KEY).await?;
        match (access_key, secret_key) {
            (None, None) => Ok(None),
            (Some(access_key), Some(secret_access_key)) => Ok(Some(Triple {
                access_key_id: access_key.expose_secret().to_owned(),
                secret_access_key,
                serial: String::new(),
            })),
            (access_key, _) => {
                let missing = if access_key.is_none() { ACCESS_KEY } else { SECRET_KEY };
                let message = format!("{missing} is missing in the organization's variables");
                Err(Error::refused(Reason::TripleIncomplete, message).with("missing", missing))
            }
        }
    }

    /// Finds a triple of which nothing is missing.
    pub(super) async fn guarding_triple(&self, scope: VariableScope) -> Result<Option<Triple>> {
        let access_key = self.triple_value(scope, ACCESS_KEY).await?;
        let secret_key = self.triple_value(scope, SECRET_KEY).await?;
        let serial = self.triple_value(scope, SERIAL).await?;
        let (Some(access_key), Some(secret_access_key), Some(serial)) =
            (access_key, secret_key, serial)
        else {
            return Ok(None);
        };
        Ok(Some(Triple {
            access_key_id: access_key.expose_secret().to_owned(),
            secret_access_key,
            serial: serial.expose_secret().to_owned(),
        }))
    }

    async fn any_of_triple(&self, scope: VariableScope) -> Result<bool> {
        for name in TRIPLE {
            let key = keys::variable(scope, &stored_name(Category::Environment, name));
            if self.store.fetch(&key).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) async fn triple_value(
        &self,
        scope: VariableScope,
        name: &str,
    ) -> Result<Option<SecretString>> {
        let key = keys::variable(scope, &stored_name(Category::Environment, name));
        let found: Option<Loaded<Variable>> = self.fetch(key.clone()).await?;
        found.map(|found| self.open_value(&key, &found.value.value)).transpose()
    }
}

/// Refuses what cannot be the serial of a device that shows codes.
pub(super) fn check_device(serial: &str, which: &str) -> Result<()> {
    check_serial(serial).map_err(|problem| {
        let message = format!("{SERIAL} in {which} cannot be used: {problem}");
        Error::refused(Reason::SerialUnusable, message)
    })
}

/// Refuses a device of another partition than the region's.
pub(super) fn check_partition(serial: &str, which: &str, region: &str) -> Result<()> {
    let expected = partition_of_region(region);
    match partition_of(serial).filter(|found| *found != expected) {
        Some(partition) => {
            let message = format!(
                "{SERIAL} in {which} belongs to the partition {partition}, but the environment's \
                 region {region} is in {expected}; set the environment's region with `latchkey env \
                 set --region`, or the serial of a device there with `latchkey var set {SERIAL}`"
            );
            Err(Error::refused(Reason::SerialUnusable, message))
        }
        None => Ok(()),
    }
}

//! Where values are: small ones sealed within their record, large ones in blobs.

use latchkey_domain::id::OrganizationId;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::NewVariable;
use super::checked::LONGEST_VALUE;
use crate::app::App;
use crate::app::claims::Claim;
use crate::app::configurations::blob_error;
use crate::error::{Error, Result};
use crate::seal::OVERHEAD;
use crate::store::keys::BlobUser;
use crate::store::record::variable::{StoredValue, Variable};
use crate::store::record::{SealedBytes, Text};
use crate::store::{Batch, Key};

/// Records are to be small; most values are far smaller still.
const LARGEST_IN_RECORD: usize = 4 * 1024;

const ID: usize = 16;

/// A value that is about to be kept.
#[derive(Debug)]
pub(super) enum Prepared {
    /// The record will hold it.
    Small,
    /// It is stored; the claim is to be settled or released.
    Stored { claim: Claim, value: StoredValue },
}

impl App {
    /// Stores a value, if a record is too small for it.
    pub(super) async fn prepare_value(
        &self,
        organization: OrganizationId,
        value: &SecretString,
    ) -> Result<Prepared> {
        let bytes = value.expose_secret().as_bytes();
        if bytes.len() <= LARGEST_IN_RECORD {
            return Ok(Prepared::Small);
        }
        let id = Uuid::new_v4();
        let length = bytes.len() as u64;
        let whole = Zeroizing::new([id.as_bytes().as_slice(), bytes].concat());
        let limit = whole.len() as u64;
        let mut upload = self.blobs.begin(organization, None, limit).await.map_err(blob_error)?;
        upload.write(&whole).await.map_err(blob_error)?;
        let claim = self.store_blob(organization, upload).await?;
        let value = StoredValue { digest: Text(claim.digest), id: Text(id), length };
        Ok(Prepared::Stored { claim, value })
    }

    /// Gives up a value that no record came to name. Idempotent.
    pub(super) async fn release_value(&self, prepared: &Prepared) -> Result<()> {
        match prepared {
            Prepared::Small => Ok(()),
            Prepared::Stored { claim, .. } => self.release_claim(claim).await,
        }
    }

    /// Makes the record that will stand under `key`.
    pub(super) fn variable_record(
        &self,
        key: &Key,
        variable: &NewVariable,
        prepared: &Prepared,
    ) -> Variable {
        let (value, stored) = match prepared {
            Prepared::Small => (self.seal_value(key, &variable.value), None),
            Prepared::Stored { value, .. } => (SealedBytes(vec![]), Some(*value)),
        };
        Variable {
            name: variable.name.clone(),
            category: variable.category,
            sensitive: variable.sensitive,
            hcl: variable.hcl,
            value,
            stored,
            updated_at: self.now().into(),
            of_plan: false,
        }
    }

    /// Reads the value of the record under `key`.
    pub(super) async fn variable_value(
        &self,
        organization: OrganizationId,
        key: &Key,
        record: &Variable,
    ) -> Result<SecretString> {
        let Some(stored) = &record.stored else { return self.open_value(key, &record.value) };
        let limit = (ID + LONGEST_VALUE) as u64;
        let bytes =
            self.blobs.get(organization, stored.digest.0, limit).await.map_err(blob_error)?;
        let text = bytes
            .expose_secret()
            .strip_prefix(stored.id.0.as_bytes().as_slice())
            .and_then(|text| std::str::from_utf8(text).ok())
            .ok_or_else(|| Error::internal("a stored value is not the one of its record"))?;
        Ok(SecretString::from(text))
    }

    /// Adds to a batch that a record, which it replaces or deletes, needs its value no more.
    pub(in crate::app) async fn end_value(
        &self,
        batch: Batch,
        organization: OrganizationId,
        record: &Variable,
    ) -> Result<Batch> {
        match &record.stored {
            None => Ok(batch),
            Some(stored) => {
                let user = BlobUser::Value(stored.id.0);
                self.end_use(batch, organization, &stored.digest.0, user).await
            }
        }
    }
}

/// The bytes of a value.
pub(super) fn length(record: &Variable) -> u64 {
    match &record.stored {
        Some(stored) => stored.length,
        None => record.value.0.len().saturating_sub(OVERHEAD) as u64,
    }
}

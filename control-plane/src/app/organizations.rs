//! An organization's settings: the AWS accounts that triples may belong to.

use std::sync::Arc;

use latchkey_domain::id::OrganizationId;

use super::App;
use super::guarded_change::{GuardedChange, Intent, Proof};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::record::encode;
use crate::store::record::people::Organization;
use crate::store::{Batch, Expect};

const MOST_ACCOUNTS: usize = 100;

impl App {
    pub async fn show_organization(&self, caller: &Caller, name: &str) -> Result<Organization> {
        let standing = self.member(caller, name).await?;
        // Made by now, whoever looks first.
        self.external_id(standing.organization).await?;
        Ok(self.organization(standing.organization).await?.value)
    }

    /// Replaces the list of accounts. With an empty list no code is spent at all.
    pub async fn update_organization(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        aws_accounts: Vec<String>,
        proof: Option<Proof>,
    ) -> Result<Organization> {
        let standing = self.owner(caller, name).await?;
        if aws_accounts.len() > MOST_ACCOUNTS {
            return Err(Error::field("aws_accounts", "at most 100 accounts"));
        }
        let well_formed =
            |account: &String| account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        if let Some(bad) = aws_accounts.iter().find(|account| !well_formed(account)) {
            let message = format!("{bad:?} is no AWS account number; give its twelve digits");
            return Err(Error::field("aws_accounts", message));
        }
        self.external_id(standing.organization).await?;
        let organization = standing.organization;
        let change = GuardedChange::Accounts(aws_accounts);
        let intent = Intent { caller: caller.clone(), organization, change };
        self.change_guarded(intent, proof).await?;
        Ok(self.organization(organization).await?.value)
    }

    /// Makes the commit that replaces the list.
    pub(super) async fn accounts_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        aws_accounts: &[String],
    ) -> Result<Batch> {
        let found = self.organization(organization).await?;
        let mut next = found.value.clone();
        next.aws_accounts = aws_accounts.to_vec();
        let subject = format!("organization {}", next.name);
        let draft = self
            .draft(organization, caller.audit_name(), "update_organization", subject)
            .with("aws_accounts_before", found.value.aws_accounts)
            .with("aws_accounts_after", next.aws_accounts.clone());
        Ok(Batch::new().put(found.key, Expect::At(found.version), encode(&next)).audit(draft))
    }
}

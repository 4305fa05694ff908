//! An organization's settings: the AWS accounts that triples may belong to.

use super::App;
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::record::encode;
use crate::store::record::people::Organization;
use crate::store::{Batch, Expect};

const MOST_ACCOUNTS: usize = 100;

impl App {
    pub async fn show_organization(&self, caller: &Caller, name: &str) -> Result<Organization> {
        let standing = self.member(caller, name).await?;
        Ok(self.organization(standing.organization).await?.value)
    }

    /// Replaces the list of accounts. With an empty list no code is spent at all.
    pub async fn update_organization(
        &self,
        caller: &Caller,
        name: &str,
        aws_accounts: Vec<String>,
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
        let found = self.organization(standing.organization).await?;
        let mut next = found.value.clone();
        next.aws_accounts = aws_accounts;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "update_organization",
                format!("organization {name}"),
            )
            .with("aws_accounts_before", found.value.aws_accounts)
            .with("aws_accounts_after", next.aws_accounts.clone());
        let batch =
            Batch::new().put(found.key, Expect::At(found.version), encode(&next)).audit(draft);
        self.store.commit(batch).await?;
        Ok(next)
    }
}

//! Who and what exists: accounts, users, keys, devices, roles, buckets.
//!
//! A world is plain data: written in Rust by a test, or read from a JSON file. What happens in it
//! (sessions, used codes, objects) is kept elsewhere. Ids, secrets and seeds that are left out
//! are made up by [`World::complete`].

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{self, KeyKind};

/// All there is at the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    pub accounts: Vec<Account>,
    #[serde(default)]
    pub buckets: Vec<Bucket>,
}

/// One AWS account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// Twelve digits.
    pub id: String,
    #[serde(default = "default_partition")]
    pub partition: String,
    #[serde(default)]
    pub users: Vec<User>,
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Regions in which STS answers `RegionDisabledException`.
    #[serde(default)]
    pub disabled_regions: Vec<String>,
}

/// An IAM user with its keys and devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub name: String,
    #[serde(default)]
    pub access_keys: Vec<AccessKey>,
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// A long-term access key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessKey {
    /// `AKIA…`; made up when empty.
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub secret: Secret,
    #[serde(default)]
    pub status: KeyStatus,
}

/// Whether a key may be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyStatus {
    #[default]
    Active,
    Inactive,
}

/// A TOTP device of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// `arn:PARTITION:iam::ACCOUNT:mfa/NAME`, or a hardware serial such as `GAHT12345678`.
    pub serial: String,
    /// In base32; made up when empty.
    #[serde(default)]
    pub seed: Secret,
}

/// A role and whom it trusts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    pub name: String,
    #[serde(default)]
    pub trust: Trust,
    #[serde(default = "default_max_session_seconds")]
    pub max_session_seconds: i64,
}

/// The trust policy of a role.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// ARNs of users and roles, account numbers, `arn:…:root`, or `*`. Empty means: all of the
    /// role's own account.
    #[serde(default)]
    pub principals: Vec<String>,
    #[serde(default)]
    pub mfa: MfaCondition,
    /// The `sts:ExternalId` that the caller must give.
    #[serde(default)]
    pub external_id: Option<String>,
}

/// The condition on `aws:MultiFactorAuthPresent`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MfaCondition {
    #[default]
    NotDemanded,
    Demanded,
}

/// A bucket and the roles whose sessions may use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    pub name: String,
    /// ARNs of roles; nobody else is let in.
    pub allowed_roles: Vec<String>,
}

/// A secret of the simulation. Not worth protecting by itself, but kept out of logs all the same,
/// so that tests which search logs for secrets find only what others put there.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Shows the secret to who needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Why a world cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    #[error("use account id {0:?}: it must be twelve digits")]
    AccountId(String),
    #[error("use the seed of device {0:?}: it must be base32")]
    Seed(String),
    #[error("add {0:?}: it exists already")]
    Duplicate(String),
    #[error("find {0:?}")]
    Unknown(String),
    #[error("use access key id {0:?}: it must be 20 characters and begin with AKIA")]
    KeyId(String),
}

impl World {
    /// Builds a world to try things in: account 123456789012, user `latchkey` with a key and a
    /// virtual device, role `deploy` (demands MFA), role `read` (does not), and the bucket
    /// `latchkey-state`, open to sessions of both roles.
    pub fn example() -> Self {
        let mut account = Account::new("123456789012");
        account.users.push(User::with_key_and_device("aws", &account.id, "latchkey"));
        account.roles.push(Role::new("deploy", MfaCondition::Demanded));
        account.roles.push(Role::new("read", MfaCondition::NotDemanded));
        let allowed_roles = account.roles.iter().map(|role| account.role_arn(role)).collect();
        let bucket = Bucket { name: "latchkey-state".to_owned(), allowed_roles };
        Self { accounts: vec![account], buckets: vec![bucket] }
    }

    /// Makes up what was left out, and refuses what cannot be.
    pub fn complete(mut self) -> Result<Self, Invalid> {
        let mut seen = Vec::new();
        for account in &mut self.accounts {
            if account.id.len() != 12 || !account.id.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(Invalid::AccountId(account.id.clone()));
            }
            for user in &mut account.users {
                for key in &mut user.access_keys {
                    key.complete(&account.id)?;
                    seen.push(key.id.clone());
                }
                for device in &mut user.devices {
                    device.complete()?;
                    seen.push(device.serial.clone());
                }
            }
        }
        seen.sort();
        match seen.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Invalid::Duplicate(pair[0].clone())),
            None => Ok(self),
        }
    }

    /// Adds a user.
    pub fn add_user(&mut self, account: &str, user: User) -> Result<(), Invalid> {
        self.changed(|world| {
            let account = world.account_mut(account)?;
            if account.users.iter().any(|known| known.name == user.name) {
                return Err(Invalid::Duplicate(user.name.clone()));
            }
            account.users.push(user);
            Ok(())
        })
    }

    /// Adds an access key to a user, or replaces the one of the same id.
    pub fn put_key(&mut self, account: &str, user: &str, key: AccessKey) -> Result<(), Invalid> {
        self.changed(|world| {
            let user = world.user_mut(account, user)?;
            user.access_keys.retain(|known| known.id != key.id);
            user.access_keys.push(key);
            Ok(())
        })
    }

    /// Adds a device to a user, or replaces the one of the same serial.
    pub fn put_device(&mut self, account: &str, user: &str, device: Device) -> Result<(), Invalid> {
        self.changed(|world| {
            let user = world.user_mut(account, user)?;
            user.devices.retain(|known| known.serial != device.serial);
            user.devices.push(device);
            Ok(())
        })
    }

    /// Adds a role, or replaces the one of the same name.
    pub fn put_role(&mut self, account: &str, role: Role) -> Result<(), Invalid> {
        let account = self.account_mut(account)?;
        account.roles.retain(|known| known.name != role.name);
        account.roles.push(role);
        Ok(())
    }

    /// Sets whether a key may be used.
    pub fn set_key_status(&mut self, id: &str, status: KeyStatus) -> Result<(), Invalid> {
        self.accounts
            .iter_mut()
            .flat_map(|account| &mut account.users)
            .flat_map(|user| &mut user.access_keys)
            .find(|key| key.id == id)
            .map(|key| key.status = status)
            .ok_or_else(|| Invalid::Unknown(id.to_owned()))
    }

    /// Takes a device away from its user.
    pub fn remove_device(&mut self, serial: &str) -> Result<(), Invalid> {
        let mut found = Err(Invalid::Unknown(serial.to_owned()));
        for user in self.accounts.iter_mut().flat_map(|account| &mut account.users) {
            let before = user.devices.len();
            user.devices.retain(|device| device.serial != serial);
            if user.devices.len() < before {
                found = Ok(());
            }
        }
        found
    }

    /// Finds a device, whoever owns it.
    pub fn device(&self, serial: &str) -> Option<&Device> {
        self.accounts
            .iter()
            .flat_map(|account| &account.users)
            .flat_map(|user| &user.devices)
            .find(|device| device.serial == serial)
    }

    /// Finds a long-term key with its user and account.
    pub(crate) fn key(&self, id: &str) -> Option<(&Account, &User, &AccessKey)> {
        self.accounts.iter().find_map(|account| {
            account.users.iter().find_map(|user| {
                let key = user.access_keys.iter().find(|key| key.id == id)?;
                Some((account, user, key))
            })
        })
    }

    pub(crate) fn account(&self, id: &str) -> Option<&Account> {
        self.accounts.iter().find(|account| account.id == id)
    }

    pub(crate) fn role(&self, arn: &str) -> Option<(&Account, &Role)> {
        self.accounts.iter().find_map(|account| {
            let role = account.roles.iter().find(|role| account.role_arn(role) == arn)?;
            Some((account, role))
        })
    }

    pub(crate) fn bucket(&self, name: &str) -> Option<&Bucket> {
        self.buckets.iter().find(|bucket| bucket.name == name)
    }

    /// Makes a change on a copy, so that a refused one leaves nothing behind.
    fn changed(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), Invalid>,
    ) -> Result<(), Invalid> {
        let mut next = self.clone();
        change(&mut next)?;
        *self = next.complete()?;
        Ok(())
    }

    fn account_mut(&mut self, id: &str) -> Result<&mut Account, Invalid> {
        self.accounts
            .iter_mut()
            .find(|account| account.id == id)
            .ok_or_else(|| Invalid::Unknown(id.to_owned()))
    }

    fn user_mut(&mut self, account: &str, name: &str) -> Result<&mut User, Invalid> {
        self.account_mut(account)?
            .users
            .iter_mut()
            .find(|user| user.name == name)
            .ok_or_else(|| Invalid::Unknown(name.to_owned()))
    }
}

impl Account {
    /// Makes an empty account of the commercial partition.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            partition: default_partition(),
            users: Vec::new(),
            roles: Vec::new(),
            disabled_regions: Vec::new(),
        }
    }

    /// Names a user of this account.
    pub fn user_arn(&self, name: &str) -> String {
        format!("arn:{}:iam::{}:user/{name}", self.partition, self.id)
    }

    /// Names a role of this account.
    pub fn role_arn(&self, role: &Role) -> String {
        format!("arn:{}:iam::{}:role/{}", self.partition, self.id, role.name)
    }
}

impl User {
    /// Makes a user with one active key and one virtual device of its own name.
    pub fn with_key_and_device(partition: &str, account: &str, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            access_keys: vec![AccessKey::default()],
            devices: vec![Device {
                serial: format!("arn:{partition}:iam::{account}:mfa/{name}"),
                seed: Secret::default(),
            }],
        }
    }
}

impl AccessKey {
    fn complete(&mut self, account: &str) -> Result<(), Invalid> {
        if self.id.is_empty() {
            self.id = ids::access_key_id(KeyKind::LongTerm, account);
        }
        if self.secret.expose().is_empty() {
            self.secret = Secret::new(ids::secret_key());
        }
        if self.id.len() == 20 && self.id.starts_with("AKIA") {
            Ok(())
        } else {
            Err(Invalid::KeyId(self.id.clone()))
        }
    }
}

impl Device {
    /// Decodes the seed.
    pub(crate) fn seed_bytes(&self) -> Vec<u8> {
        ids::from_base32(self.seed.expose()).unwrap_or_default()
    }

    fn complete(&mut self) -> Result<(), Invalid> {
        if self.seed.expose().is_empty() {
            self.seed = Secret::new(ids::device_seed());
        }
        match ids::from_base32(self.seed.expose()) {
            Some(_) => Ok(()),
            None => Err(Invalid::Seed(self.serial.clone())),
        }
    }
}

impl Role {
    /// Makes a role that trusts its own account.
    pub fn new(name: &str, mfa: MfaCondition) -> Self {
        Self {
            name: name.to_owned(),
            trust: Trust { mfa, ..Trust::default() },
            max_session_seconds: default_max_session_seconds(),
        }
    }
}

fn default_partition() -> String {
    "aws".to_owned()
}

fn default_max_session_seconds() -> i64 {
    3600
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_of_a_file_is_made_up() {
        let json = r#"{"accounts": [{"id": "210987654321", "users": [{"name": "alice",
            "access_keys": [{}], "devices": [{"serial": "GAHT12345678"}]}],
            "roles": [{"name": "deploy", "trust": {"mfa": "demanded"}}]}]}"#;
        let world = serde_json::from_str::<World>(json).unwrap().complete().unwrap();
        let user = &world.accounts[0].users[0];
        assert_eq!(ids::account_of(&user.access_keys[0].id).unwrap(), "210987654321");
        assert_eq!(user.access_keys[0].secret.expose().len(), 40);
        assert!(!user.devices[0].seed_bytes().is_empty());
        assert_eq!(world.accounts[0].roles[0].max_session_seconds, 3600);
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut world = World::example().complete().unwrap();
        let before = world.clone();
        let bad_seed = Device { serial: "GAHT12345678".to_owned(), seed: Secret::new("1!") };
        let refused = world.put_device("123456789012", "latchkey", bad_seed);
        assert_eq!(refused, Err(Invalid::Seed("GAHT12345678".to_owned())));
        let nobody = world.put_key("123456789012", "bob", AccessKey::default());
        assert_eq!(nobody, Err(Invalid::Unknown("bob".to_owned())));
        assert_eq!(world, before);
        let short = World { accounts: vec![Account::new("12")], buckets: vec![] };
        assert_eq!(short.complete(), Err(Invalid::AccountId("12".to_owned())));
    }

    #[test]
    fn debug_output_shows_no_secret() {
        let world = World::example().complete().unwrap();
        let user = &world.accounts[0].users[0];
        let shown = format!("{world:?}");
        assert!(!shown.contains(user.access_keys[0].secret.expose()));
        assert!(!shown.contains(user.devices[0].seed.expose()));
    }
}

//! What a caller must know to use the simulation: the content of the ready file.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::state::Shared;
use crate::world::Secret;

/// The address, and what belongs to the first user of the first account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub address: SocketAddr,
    /// The endpoint for STS, S3 (path style) and, under `/_simulator`, the control API.
    pub url: String,
    pub region: String,
    pub account_id: String,
    pub user: String,
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub mfa_serial: String,
    /// The ARNs of all roles of the account.
    pub roles: Vec<String>,
    /// The names of all buckets.
    pub buckets: Vec<String>,
}

impl Facts {
    /// Gathers the facts; what is not there is empty.
    pub(crate) fn of(shared: &Shared) -> Self {
        let state = shared.lock();
        let account = state.world.accounts.first();
        let user = account.and_then(|account| account.users.first());
        let key = user.and_then(|user| user.access_keys.first());
        let device = user.and_then(|user| user.devices.first());
        Self {
            address: shared.address,
            url: format!("http://{}", shared.address),
            region: "us-east-1".to_owned(),
            account_id: account.map(|account| account.id.clone()).unwrap_or_default(),
            user: user.map(|user| user.name.clone()).unwrap_or_default(),
            access_key_id: key.map(|key| key.id.clone()).unwrap_or_default(),
            secret_access_key: key.map(|key| key.secret.clone()).unwrap_or_default(),
            mfa_serial: device.map(|device| device.serial.clone()).unwrap_or_default(),
            roles: account
                .map(|account| account.roles.iter().map(|role| account.role_arn(role)).collect())
                .unwrap_or_default(),
            buckets: state.world.buckets.iter().map(|bucket| bucket.name.clone()).collect(),
        }
    }
}

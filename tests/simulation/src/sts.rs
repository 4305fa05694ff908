//! AWS STS as a port of the simulation: slow, refusing, silent after it has read a code.

use std::sync::Arc;
use std::time::Duration;

use latchkey_control_plane::clock::Clock;
use latchkey_control_plane::store::BoxFuture;
use latchkey_control_plane::sts::{
    Class, Code, Credentials, Exchange, Identity, Refused, Sts, Told, Wanted,
};
use secrecy::ExposeSecret;

use crate::plan::Plant;
use crate::world::World;

pub(crate) const ACCOUNT: &str = "123456789012";

/// Codes that end in this digit are wrong ones.
pub(crate) const WRONG: char = '7';

pub(crate) struct SimulatedSts {
    pub(crate) world: Arc<World>,
}

impl SimulatedSts {
    async fn once(&self, code: Option<&str>, duration: Duration) -> Exchange {
        let world = &self.world;
        let troubled = world.is_troubled();
        tokio::time::sleep(world.chance.millis(2, if troubled { 400 } else { 40 })).await;
        if troubled && world.chance.happens(0.05) {
            return Exchange::NotReached;
        }
        let access_key_id = world.model.sts_received(code);
        if code.is_some_and(|code| code.ends_with(WRONG)) {
            let (class, told) = (Class::CodeRejected, Told::default());
            let refused = Refused { class, request_id: None, told };
            return Exchange::Refused(refused);
        }
        let expires_at = world.clock.now() + duration;
        tokio::time::sleep(world.chance.millis(2, if troubled { 400 } else { 40 })).await;
        if troubled && world.chance.happens(0.08) {
            return Exchange::Unknown { request_id: None };
        }
        let credentials = Credentials {
            access_key_id,
            secret_access_key: "secret".into(),
            session_token: Some("token".into()),
            expires_at: Some(expires_at),
        };
        Exchange::Issued { credentials, request_id: None, packed_percent: None }
    }
}

impl Sts for SimulatedSts {
    fn exchange<'a>(
        &'a self,
        _signer: &'a Credentials,
        code: Option<Code<'a>>,
        wanted: &'a Wanted,
    ) -> BoxFuture<'a, Exchange> {
        Box::pin(async move {
            let code = code.map(|code| code.digits.expose_secret());
            let duration = wanted.duration;
            let exchange = self.once(code, duration).await;
            match exchange {
                // What an SDK with its retries on does.
                Exchange::Unknown { .. } if self.world.plant == Some(Plant::CodeTwice) => {
                    self.once(code, duration).await
                }
                exchange => exchange,
            }
        })
    }

    fn identify<'a>(
        &'a self,
        _signer: &'a Credentials,
        _region: &'a str,
    ) -> BoxFuture<'a, Identity> {
        Box::pin(async move {
            tokio::time::sleep(self.world.chance.millis(2, 40)).await;
            if self.world.is_troubled() && self.world.chance.happens(0.1) {
                return Identity::Unavailable;
            }
            Identity::Account(ACCOUNT.to_owned())
        })
    }
}

//! A control plane to measure: a real process with data of its own. No terraform and no AWS, for
//! rows whose load comes from callers and simulated runners.

use std::sync::Arc;

use anyhow::Context;
use latchkey_harness::{Person, PlaneOptions, Stage, TestPlane};
use latchkey_proto::v1;
use tempfile::TempDir;

use crate::programs::programs;
use latchkey_harness::simulated_runner::{Identity, Listener};

/// The most uses of one pool token.
const USES: u32 = 500;
/// Runners that enroll at a time: the control plane takes few who have proved nothing yet.
const ENROLLING: usize = 8;

/// Fields are dropped in order: the process before its directory.
pub(crate) struct Bed {
    pub(crate) plane: TestPlane,
    pub(crate) owner: Person,
    pub(crate) directory: TempDir,
}

impl Bed {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("latchkey-budget-").tempdir()?;
        // Nobody listens there: what is measured on it asks AWS for nothing.
        let options =
            PlaneOptions { sts_endpoint: "http://127.0.0.1:9".into(), ..Default::default() };
        let plane =
            TestPlane::start(programs()?.control_plane(), directory.path(), options).await?;
        let owner = Person::bootstrap(&plane, Stage::ORGANIZATION, Stage::OWNER).await?;
        owner.create_pool(Stage::POOL).await?;
        Ok(Self { plane, owner, directory })
    }

    /// Makes environments `e0`, `e1`, … whose runs demand no code and get no credentials.
    pub(crate) async fn environments(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let names: Vec<_> = (0..count).map(|number| format!("e{number}")).collect();
        let mut making = tokio::task::JoinSet::new();
        for name in names.clone() {
            let owner = self.owner.clone();
            let settings = v1::EnvironmentSettings {
                mfa_policy: v1::MfaPolicy::Never.into(),
                pool: Stage::POOL.to_owned(),
                plain_credentials: v1::PlainCredentials::None.into(),
                ..Default::default()
            };
            making.spawn(async move { owner.create_environment_with(&name, settings).await });
        }
        while let Some(made) = making.join_next().await {
            made?.context("make an environment")?;
        }
        Ok(names)
    }

    /// Queues a run of an archive that was uploaded.
    pub(crate) fn queue(environment: &str, digest: &str) -> v1::QueueRunRequest {
        v1::QueueRunRequest {
            organization: Stage::ORGANIZATION.to_owned(),
            environment: environment.to_owned(),
            configuration_digest: digest.to_owned(),
            request_id: uuid::Uuid::new_v4().to_string(),
            ..Default::default()
        }
    }

    pub(crate) fn listener(&self) -> anyhow::Result<Listener> {
        Ok(Listener { url: self.plane.runners_url(), ca_pem: Arc::from(self.plane.ca_pem()?) })
    }

    /// Enrolls so many runners, over one connection: a token sells up to 500 certificates, one
    /// after the other, and several are used at a time.
    pub(crate) async fn enroll(&self, count: usize) -> anyhow::Result<Vec<Identity>> {
        let channel = self.listener()?.endpoint(None)?.connect().await?;
        let mut enrolling = tokio::task::JoinSet::new();
        let mut all = Vec::with_capacity(count);
        for (number, share) in shares(count, USES as usize / 4).into_iter().enumerate() {
            if enrolling.len() == ENROLLING
                && let Some(identities) = enrolling.join_next().await
            {
                all.extend(identities??);
            }
            let request = v1::CreatePoolTokenRequest {
                organization: Stage::ORGANIZATION.to_owned(),
                pool: Stage::POOL.to_owned(),
                lifetime: None,
                uses: USES,
                request_id: uuid::Uuid::new_v4().to_string(),
            };
            let answer = self.owner.pools().create_pool_token(request).await;
            let token = answer.context("make a pool token")?.into_inner().token;
            let channel = channel.clone();
            enrolling.spawn(async move {
                let mut identities = Vec::with_capacity(share);
                for one in 0..share {
                    let name = format!("simulated-{number}-{one}");
                    identities.push(Identity::enroll(channel.clone(), &token, &name).await?);
                }
                anyhow::Ok(identities)
            });
        }
        while let Some(identities) = enrolling.join_next().await {
            all.extend(identities??);
        }
        Ok(all)
    }

    /// The process id of the control plane.
    pub(crate) fn pid(&self) -> anyhow::Result<i32> {
        let process = self.plane.process().context("find the control plane's process")?;
        Ok(process.pid().as_raw_nonzero().get())
    }
}

/// Cuts a number into parts of at most so many.
fn shares(count: usize, most: usize) -> Vec<usize> {
    (0..count.div_ceil(most)).map(|number| most.min(count - number * most)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        assert_eq!(shares(1000, 125), vec![125; 8]);
        assert_eq!(shares(3, 125), vec![3]);
        assert_eq!(shares(130, 125), vec![125, 5]);
    }
}

//! Many connected runners that get no job, beside a real one that does.

use std::sync::Arc;

use anyhow::Context;
use latchkey_harness::Stage;
use latchkey_proto::v1;
use tokio::task::JoinSet;
use uuid::Uuid;

use latchkey_harness::simulated_runner::{Identity, Listener, SimulatedRunner};

/// The most that one pool token lets in.
const USES: u32 = 500;

/// How many connect at once, each with a token of its own: enough to keep the cores busy.
const AT_ONCE: usize = 8;

/// Runners of the stage's pool that stay connected until this is dropped.
#[derive(Debug)]
pub(crate) struct SimulatedRunners {
    _idle: JoinSet<anyhow::Result<()>>,
}

impl SimulatedRunners {
    /// Enrols so many, with one slot each: the real one, with more idle slots, is preferred.
    pub(crate) async fn connect(stage: &Stage, count: usize) -> anyhow::Result<Self> {
        let (url, ca) = (stage.plane.runners_url(), stage.plane.ca_pem()?);
        let listener = Listener { url, ca_pem: Arc::from(ca) };
        let mut opening = JoinSet::new();
        for part in 0..AT_ONCE {
            let (listener, token) = (listener.clone(), pool_token(stage).await?);
            opening.spawn(async move {
                let enrolling = listener.endpoint(None)?.connect().await?;
                let mut opened = Vec::new();
                for number in (part..count).step_by(AT_ONCE) {
                    let name = format!("simulated-{number}");
                    let identity = Identity::enroll(enrolling.clone(), &token, &name).await?;
                    let runner = SimulatedRunner::connect(&listener, &identity, 1).await?;
                    // Heartbeats are spread over the interval, as they are in life.
                    let phase = number as f64 / count as f64;
                    opened.push((runner, phase));
                }
                anyhow::Ok(opened)
            });
        }
        let mut idle = JoinSet::new();
        while let Some(opened) = opening.join_next().await {
            for (runner, phase) in opened?? {
                idle.spawn(runner.idle(phase));
            }
        }
        Ok(Self { _idle: idle })
    }
}

async fn pool_token(stage: &Stage) -> anyhow::Result<String> {
    let request = v1::CreatePoolTokenRequest {
        organization: Stage::ORGANIZATION.to_owned(),
        pool: Stage::POOL.to_owned(),
        lifetime: None,
        uses: USES,
        request_id: Uuid::new_v4().to_string(),
    };
    let answer = stage.owner.pools().create_pool_token(request).await;
    Ok(answer.context("make a pool token")?.into_inner().token)
}

//! Code submitted → plan leased.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use latchkey_aws_simulator::{Facts, User, World};
use latchkey_harness::{Configuration, Stage, is_ended};
use latchkey_proto::v1::{self, MfaPolicy, Phase, RunKind, RunState};
use uuid::Uuid;

use crate::clock::Moment;
use crate::physics::{self, Spread};
use crate::row::{Budget, Context, Figure, Limit, Row};
use crate::timed_runs::{Prepared, StubStage, prepare_with, watch};

/// What Latchkey lets one device try in three minutes, but for the one that replaces it.
const CODES: usize = 4;

pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let devices = context.pick(2, 10);
    let mut world = World::example();
    let account = world.accounts.first_mut().context("find an account in the example")?;
    for number in 0..devices {
        let user = User::with_key_and_device("aws", &account.id, &format!("user-{number}"));
        account.users.push(user);
    }
    let world = world.complete()?;
    let users = world.accounts[0].users[1..].to_vec();
    let stage = StubStage::start_in(world).await?;
    let (mut leased, mut answered) = (Vec::new(), Vec::new());
    let mut before = stage.stage.aws.facts().mfa_serial.clone();
    for user in &users {
        let prepared = prepare(&stage, user, &before).await?;
        before.clone_from(&user.devices[0].serial);
        for _ in 0..CODES {
            let one = authenticate(&stage, &prepared, &user.devices[0].serial).await?;
            leased.push(one.leased);
            answered.push(one.answered);
        }
    }
    // The first makes the connection to STS.
    leased.remove(0);
    answered.remove(0);
    let count = leased.len();
    let sts = sts_answer(&stage).await?;
    let limit = physics::fsync_and_round_trip(stage.stage.directory()).await?;
    let (leased, answered) = (Spread::of(&mut leased), Spread::of(&mut answered));
    let note = format!(
        "{count} codes of {devices} devices, one after the other. Authenticate sent → a watcher sees the plan's lease; \
         Authenticate itself was answered after {:.1} ms (p50). The simulated STS answers at \
         once: {:.1} ms for a request over a new connection, without its check of the signature. \
         A call to AWS takes about 100 ms instead and is waited for once per code. Does not grow \
         with what is stored; codes of one device are exchanged one after the other",
        millis(answered.p50),
        millis(sts),
    );
    let row = |quantile: &str, figure, limit| Row {
        name: format!("code, {quantile}"),
        figure: Figure::millis(figure),
        limit: Some(Limit {
            what: "one fdatasync and one bare gRPC round trip",
            figure: Figure::millis(limit),
        }),
        budget: Budget::None,
        note: note.clone(),
    };
    Ok(vec![row("p50", leased.p50, limit.p50), row("p99", leased.p99, limit.p99)])
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Makes an environment, and one user's device that of the organization.
async fn prepare(stage: &StubStage, user: &User, before: &str) -> anyhow::Result<Prepared> {
    let owner = &stage.stage.owner;
    let settings = v1::EnvironmentSettings {
        mfa_policy: MfaPolicy::PlansAndApplies.into(),
        pool: Stage::POOL.to_owned(),
        ..Default::default()
    };
    let configuration =
        Configuration::of(&[("main.tf", "resource \"terraform_data\" \"one\" {}\n")]);
    let prepared = prepare_with(owner, &user.name, &configuration, settings).await?;
    let facts = Facts {
        access_key_id: user.access_keys[0].id.clone(),
        secret_access_key: user.access_keys[0].secret.clone(),
        mfa_serial: user.devices[0].serial.clone(),
        ..stage.stage.aws.facts().clone()
    };
    // In turn: environments have no triple of their own.
    let code = stage.stage.aws.unused_code_of(before).await?;
    owner.replace_triple(&facts, &code).await?;
    Ok(prepared)
}

struct Authenticated {
    answered: Duration,
    leased: Duration,
}

async fn authenticate(
    stage: &StubStage,
    prepared: &Prepared,
    serial: &str,
) -> anyhow::Result<Authenticated> {
    let (owner, aws) = (&stage.stage.owner, &stage.stage.aws);
    let run = prepared.queue(owner, RunKind::PlanOnly).await?;
    let waits = |run: &v1::Run| run.state() == RunState::AwaitingPlanMfa;
    watch(owner, &run.run_id, waits).await?;
    let request = v1::AuthenticateRequest {
        run_id: run.run_id.clone(),
        phase: Phase::Plan.into(),
        token_code: aws.unused_code_of(serial).await?,
        plan_digest: String::new(),
        request_id: Uuid::new_v4().to_string(),
    };
    let leased = tokio::spawn({
        let (owner, run_id) = (owner.clone(), run.run_id.clone());
        async move {
            let is_leased = |run: &v1::Run| run.plan.as_ref().is_some_and(|plan| plan.epoch > 0);
            watch(&owner, &run_id, is_leased).await
        }
    });
    let sent = Moment::now();
    owner.runs().authenticate(request).await.context("authenticate")?;
    let answered = Moment::now().since(sent);
    let leased = leased.await??.at.since(sent);
    watch(owner, &run.run_id, is_ended).await?;
    Ok(Authenticated { answered, leased })
}

/// The middle of a few answers of the simulated AWS.
async fn sts_answer(stage: &StubStage) -> anyhow::Result<Duration> {
    let mut samples = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        stage.stage.aws.requests_with_code("000000").await?;
        samples.push(start.elapsed());
    }
    Ok(Spread::of(&mut samples).p50)
}

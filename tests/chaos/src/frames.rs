//! A runner whose frames come twice, late and in another order.
//!
//! It plays a whole run over the real protocol, and every now and then says again, shuffled, a
//! part of all it has ever said. None of that may change anything: not the run, not its log, not
//! the state; and no `Go` may come for a lease that is not the current one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use aws_lc_rs::digest::{SHA256, digest};
use latchkey_harness::simulated_runner::{Identity, Listener, SimulatedRunner};
use latchkey_harness::stub::Script;
use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::upload_artifact_request::Part;
use latchkey_proto::v1::{ArtifactKind, MfaPolicy, Phase, PlainCredentials, RunState};
use tokio::time::{Instant, timeout};

use crate::bed::Bed;
use crate::check::Violation;
use crate::random::Random;

const POOL: &str = "frames";
const LIMIT: Duration = Duration::from_secs(20);
const HEARTBEAT: Duration = Duration::from_millis(500);

/// What a round came to.
pub(crate) struct Played {
    pub(crate) struck: u64,
    pub(crate) violations: Vec<Violation>,
}

struct Runner {
    listener: Listener,
    connection: SimulatedRunner,
    sent: Vec<Request>,
    /// Leases that are held, for heartbeats.
    held: Vec<v1::LeaseRef>,
    gos: Vec<v1::LeaseRef>,
    recorded: Vec<v1::LeaseRef>,
    beaten: Instant,
    /// Frames said again.
    again: u64,
}

/// Plays a round on a bed whose own runner looks on.
pub(crate) async fn play(bed: &mut Bed, random: &mut Random) -> anyhow::Result<Played> {
    bed.rounds += 1;
    let owner = bed.owner.clone();
    if bed.rounds == 1 {
        owner.create_pool(POOL).await?;
    }
    let environment = format!("f{}", bed.rounds);
    let settings = v1::EnvironmentSettings {
        mfa_policy: MfaPolicy::Never.into(),
        pool: POOL.to_owned(),
        plain_credentials: PlainCredentials::None.into(),
        ..Default::default()
    };
    owner.create_environment_with(&environment, settings).await?;
    let listener =
        Listener { url: bed.plane.runners_url(), ca_pem: Arc::from(bed.plane.ca_pem()?) };
    let token = owner.pool_token(POOL).await?;
    let channel = listener.endpoint(None)?.connect().await?;
    let name = format!("scripted-{}", bed.rounds);
    let identity = Identity::enroll(channel, &token, &name).await?;
    let connection = SimulatedRunner::connect(&listener, &identity, 1).await?;
    let mut runner = Runner {
        listener,
        connection,
        sent: Vec::new(),
        held: Vec::new(),
        gos: Vec::new(),
        recorded: Vec::new(),
        beaten: Instant::now(),
        again: 0,
    };
    let run = owner.queue(&environment, &Script::default().configuration()).await?;
    let mut violations = Vec::new();

    // The plan, sometimes given back once: then its first epoch is history.
    let mut plan = runner.offer().await?;
    if random.once_in(4) {
        runner.say(accept(&plan)).await?;
        runner.say(Request::NeverStarted(v1::NeverStarted { lease: Some(plan.clone()) })).await?;
        runner.held.clear();
        plan = runner.offer().await?;
    }
    runner.begin(&plan, random).await?;
    let plan_log = text(random, "plan");
    runner.append(&plan, &plan_log, random).await?;
    let workspace = random.next().to_string().repeat(50).into_bytes();
    let changes = br#"{"changes":[]}"#.to_vec();
    for _ in 0..=random.below(2) {
        runner.upload(&plan, ArtifactKind::Workspace, &workspace, 0).await?;
        runner.upload(&plan, ArtifactKind::Changes, &changes, 0).await?;
        runner.disturb(random).await?;
    }
    let result = v1::finished::Result::Plan(v1::PlanFinished {
        digests: Some(v1::ApprovedPlan {
            plan_digest: sha256(b"plan"),
            workspace_digest: sha256(&workspace),
            lock_file_digest: String::new(),
            changes_digest: sha256(&changes),
        }),
        applyable: true,
        add: 1,
        terraform_version: "1.11.4".to_owned(),
        ..Default::default()
    });
    runner.finish(&plan, plan_log.len(), result, random).await?;
    owner.wait_for_state(&run.run_id, RunState::AwaitingConfirmation).await?;
    runner.disturb(random).await?;
    owner.confirm(&run.run_id).await?;

    // The apply.
    let apply = runner.offer().await?;
    runner.disturb(random).await?;
    runner.begin(&apply, random).await?;
    let apply_log = text(random, "apply");
    runner.append(&apply, &apply_log, random).await?;
    let newest = 2 + random.below(4);
    for serial in 1..=newest {
        runner.upload(&apply, ArtifactKind::State, &state(&run.run_id, serial), serial).await?;
        if random.once_in(2) {
            // One that is late must not come after a newer one.
            let late = 1 + random.below(serial);
            let state = state(&run.run_id, late);
            let _ = runner.upload(&apply, ArtifactKind::State, &state, late).await;
        }
        runner.disturb(random).await?;
    }
    let result = v1::finished::Result::Apply(v1::ApplyFinished::default());
    runner.finish(&apply, apply_log.len(), result, random).await?;
    let ended = owner.wait_for_state(&run.run_id, RunState::Applied).await?;

    // And all of it once more.
    let all = runner.sent.clone();
    runner.repeat(all, random).await?;
    let _ = runner.upload(&apply, ArtifactKind::State, &state(&run.run_id, 1), 1).await;
    runner.settle().await?;
    let after = owner.run(&run.run_id).await?;
    let mut unless = |holds: bool, invariant: &'static str, detail: String| {
        if !holds {
            violations.push(Violation { invariant, detail });
        }
    };
    unless(
        after.state() == RunState::Applied && after.update_time == ended.update_time,
        "a stale frame changes nothing",
        format!("the run was {:?} and is {:?}", ended.state(), after.state()),
    );
    let facts = |phase: &Option<v1::JobFacts>| phase.as_ref().map_or(0, |facts| facts.epoch);
    unless(
        facts(&after.plan) == plan.epoch && facts(&after.apply) == apply.epoch,
        "a stale frame changes nothing",
        format!("epochs are {} and {}", facts(&after.plan), facts(&after.apply)),
    );
    for go in &runner.gos {
        unless(
            *go == plan || *go == apply,
            "a stale frame changes nothing",
            format!("a Go came for {go:?}"),
        );
    }
    for (phase, sent) in [(Phase::Plan, &plan_log), (Phase::Apply, &apply_log)] {
        let log = owner.read_log(&run.run_id, phase).await?;
        // A phase that was leased twice has our own line about it between.
        unless(
            log == *sent || (plan.epoch > 1 && phase == Phase::Plan && log.ends_with(sent)),
            "the log is what terraform printed",
            format!("{phase:?}: {} bytes were sent, {} are there", sent.len(), log.len()),
        );
    }
    let serial = owner.environment(&environment).await?.state_serial;
    unless(serial == newest, "no state is lost", format!("{newest} was sent, {serial} is current"));
    let verified = owner.verify_audit().await?;
    unless(verified.intact, "the audit chain verifies", verified.problem);
    Ok(Played { struck: runner.again, violations })
}

impl Runner {
    async fn offer(&mut self) -> anyhow::Result<v1::LeaseRef> {
        let lease = self
            .until("an offer", |frame| match frame {
                Response::Offer(offer) => offer.lease.clone(),
                _ => None,
            })
            .await?;
        self.held = vec![lease.clone()];
        Ok(lease)
    }

    /// Says something for the first time.
    async fn say(&mut self, request: Request) -> anyhow::Result<()> {
        self.sent.push(request.clone());
        self.connection.send(request).await
    }

    /// `Accept` and `Starting`, in some order, some number of times, until `Go`.
    async fn begin(&mut self, lease: &v1::LeaseRef, random: &mut Random) -> anyhow::Result<()> {
        let mut frames = vec![accept(lease)];
        for _ in 0..=random.below(3) {
            frames.push(starting(lease));
        }
        if random.once_in(2) {
            frames.reverse();
        }
        let before = self.gos.len();
        for frame in frames {
            self.say(frame).await?;
        }
        self.wait("a Go", |runner| runner.gos.len() > before).await
    }

    async fn finish(
        &mut self,
        lease: &v1::LeaseRef,
        length: usize,
        result: v1::finished::Result,
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let finished = Request::Finished(v1::Finished {
            lease: Some(lease.clone()),
            log_length: length as u64,
            result: Some(result),
        });
        for _ in 0..=random.below(3) {
            self.say(finished.clone()).await?;
        }
        self.disturb(random).await?;
        self.wait("Recorded", |runner| runner.recorded.contains(lease)).await?;
        self.held.clear();
        Ok(())
    }

    /// Says a few old things again, in any order.
    async fn disturb(&mut self, random: &mut Random) -> anyhow::Result<()> {
        let count = random.below(4);
        let old: Vec<Request> = (0..count).map(|_| random.pick(&self.sent).clone()).collect();
        self.repeat(old, random).await
    }

    async fn repeat(&mut self, mut old: Vec<Request>, random: &mut Random) -> anyhow::Result<()> {
        while !old.is_empty() {
            let at = usize::try_from(random.below(old.len() as u64)).unwrap_or(0);
            self.again += 1;
            self.connection.send(old.swap_remove(at)).await?;
            self.beat_when_due().await?;
            self.pause(random.millis(0, 20)).await?;
        }
        Ok(())
    }

    /// Reads for a moment.
    async fn pause(&mut self, lasts: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + lasts;
        while let Ok(frame) = tokio::time::timeout_at(end, self.connection.next()).await {
            let frame = frame?;
            self.hear(&frame);
        }
        Ok(())
    }

    /// Waits until what was said is answered.
    async fn settle(&mut self) -> anyhow::Result<()> {
        self.connection.send(Request::Heartbeat(v1::Heartbeat { held: vec![] })).await?;
        self.until("an answer", |frame| matches!(frame, Response::Renewed(_)).then_some(()))
            .await?;
        self.pause(Duration::from_millis(200)).await
    }

    fn hear(&mut self, frame: &Response) {
        match frame {
            Response::Go(go) => self.gos.extend(go.lease.clone()),
            Response::Recorded(recorded) => self.recorded.extend(recorded.lease.clone()),
            Response::Welcome(_)
            | Response::Offer(_)
            | Response::Renewed(_)
            | Response::Cancel(_)
            | Response::Revoke(_)
            | Response::Drain(_)
            | Response::Resume(_) => {}
        }
    }

    async fn wait(&mut self, what: &str, reached: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let begin = Instant::now();
        while !reached(self) {
            anyhow::ensure!(begin.elapsed() < LIMIT, "wait for {what}");
            self.beat_when_due().await?;
            self.pause(Duration::from_millis(20)).await?;
        }
        Ok(())
    }

    /// A lease that is up because this program was slow would be no finding.
    async fn beat_when_due(&mut self) -> anyhow::Result<()> {
        if self.beaten.elapsed() < HEARTBEAT { Ok(()) } else { self.beat().await }
    }

    async fn beat(&mut self) -> anyhow::Result<()> {
        self.beaten = Instant::now();
        let held = self.held.clone();
        self.connection.send(Request::Heartbeat(v1::Heartbeat { held })).await
    }

    async fn until<T>(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Response) -> Option<T>,
    ) -> anyhow::Result<T> {
        let begin = Instant::now();
        loop {
            anyhow::ensure!(begin.elapsed() < LIMIT, "wait for {what}");
            match timeout(HEARTBEAT, self.connection.next()).await {
                Ok(frame) => {
                    let frame = frame?;
                    self.hear(&frame);
                    if let Some(found) = wanted(&frame) {
                        return Ok(found);
                    }
                }
                Err(_) => self.beat().await?,
            }
        }
    }

    /// Appends a log with pieces that come twice, overlap, or come too early.
    async fn append(
        &mut self,
        lease: &v1::LeaseRef,
        log: &[u8],
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let mut pieces: Vec<(usize, usize)> = Vec::new();
        let mut at = 0;
        while at < log.len() {
            let end = (at + 1 + usize::try_from(random.below(900))?).min(log.len());
            pieces.push((at, end));
            if random.once_in(3) {
                let back = usize::try_from(random.below(at as u64 + 1))?;
                pieces.push((back, end));
            }
            at = end;
        }
        if random.once_in(2) && pieces.len() > 2 {
            let other = usize::try_from(random.below(pieces.len() as u64 - 1))?;
            pieces.swap(other, other + 1);
        }
        // A gap ends the stream; then all comes again, from the first byte on.
        let orderly: Vec<(usize, usize)> =
            (0..log.len()).step_by(1000).map(|at| (at, (at + 1000).min(log.len()))).collect();
        for pieces in [pieces, orderly] {
            if self.send_pieces(lease, log, &pieces).await? == log.len() as u64 {
                return Ok(());
            }
            self.again += 1;
        }
        anyhow::bail!("append a log: it was not taken whole")
    }

    async fn send_pieces(
        &mut self,
        lease: &v1::LeaseRef,
        log: &[u8],
        pieces: &[(usize, usize)],
    ) -> anyhow::Result<u64> {
        self.beat_when_due().await?;
        let mut first = Some(lease.clone());
        let messages: Vec<v1::AppendLogRequest> = pieces
            .iter()
            .map(|(at, end)| v1::AppendLogRequest {
                lease: first.take(),
                offset: *at as u64,
                data: log[*at..*end].to_vec(),
            })
            .collect();
        let mut client = self.connection.client.clone();
        let mut answers = client.append_log(tokio_stream::iter(messages)).await?.into_inner();
        let mut durable = 0;
        while let Ok(Some(answer)) = answers.message().await {
            durable = answer.durable_length;
        }
        Ok(durable)
    }

    async fn upload(
        &mut self,
        lease: &v1::LeaseRef,
        kind: ArtifactKind,
        data: &[u8],
        sequence: u64,
    ) -> anyhow::Result<bool> {
        self.beat_when_due().await?;
        let header = v1::ArtifactHeader {
            lease: Some(lease.clone()),
            kind: kind.into(),
            digest: sha256(data),
            size: data.len() as u64,
            sequence,
        };
        let parts = [Part::Header(header), Part::Data(data.to_vec())]
            .map(|part| v1::UploadArtifactRequest { part: Some(part) });
        let answer = self.connection.client.upload_artifact(tokio_stream::iter(parts)).await;
        Ok(answer.context("upload an artifact")?.into_inner().quarantined)
    }
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("listener", &self.listener.url).finish_non_exhaustive()
    }
}

fn accept(lease: &v1::LeaseRef) -> Request {
    Request::Accept(v1::Accept { lease: Some(lease.clone()) })
}

fn starting(lease: &v1::LeaseRef) -> Request {
    Request::Starting(v1::Starting { lease: Some(lease.clone()) })
}

fn text(random: &mut Random, what: &str) -> Vec<u8> {
    let lines = 20 + random.below(200);
    (0..lines)
        .map(|number| {
            format!("{{\"@level\":\"info\",\"@message\":\"{what} {number}\",\"type\":\"log\"}}\n")
        })
        .collect::<String>()
        .into_bytes()
}

fn state(run: &str, serial: u64) -> Vec<u8> {
    format!("{{\"version\":4,\"serial\":{serial},\"lineage\":\"{run}\",\"resources\":[]}}")
        .into_bytes()
}

fn sha256(data: &[u8]) -> String {
    digest(&SHA256, data).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

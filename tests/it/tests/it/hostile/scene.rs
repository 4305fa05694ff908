//! A control plane, an honest runner that holds a plan, and a hostile one with a certificate.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use aws_lc_rs::digest;
use latchkey_harness::simulated_runner::{Identity, Listener, SimulatedRunner};
use latchkey_harness::{Configuration, PlaneOptions, Stage, StageOptions, reason};
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use latchkey_proto::v1::upload_artifact_request::Part;
use latchkey_proto::v1::{self, ArtifactKind, MfaPolicy, Phase, RunState};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::gated::SMALL;
use crate::support::options;

/// How long an answer may take while somebody floods.
const SOON: Duration = Duration::from_secs(10);

pub(crate) struct Scene {
    pub(crate) stage: Stage,
    pub(crate) listener: Listener,
    pub(crate) honest: SimulatedRunner,
    pub(crate) honest_identity: Identity,
    /// What the honest runner holds: a plan that has its `Go`.
    pub(crate) lease: v1::LeaseRef,
    /// The hostile runner's certificate, of another pool.
    pub(crate) identity: Identity,
    /// Its own connection.
    pub(crate) client: RunnerServiceClient<Channel>,
}

impl Scene {
    pub(crate) async fn new() -> anyhow::Result<Self> {
        Self::with(&[]).await
    }

    /// With further arguments of the control plane's.
    pub(crate) async fn with(arguments: &[&str]) -> anyhow::Result<Self> {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        // Long enough that no lease expires by itself while a test looks.
        let plane = PlaneOptions { lease_term: Some(60), arguments, ..PlaneOptions::default() };
        let stage = Stage::start(StageOptions { runners: vec![], plane, ..options() }).await?;
        let ada = &stage.owner;
        ada.create_pool("hostile").await?;
        let listener = Listener {
            url: stage.plane.runners_url(),
            ca_pem: Arc::from(stage.plane.ca_pem()?.as_str()),
        };
        let honest_identity = enroll(&stage, &listener, Stage::POOL, "honest").await?;
        let identity = enroll(&stage, &listener, "hostile", "hostile").await?;
        ada.create_environment("web", MfaPolicy::Never).await?;
        let run = ada.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await?;
        let mut honest = SimulatedRunner::connect(&listener, &honest_identity, 1).await?;
        let (lease, _) = honest.offer().await?;
        anyhow::ensure!(lease.run_id == run.run_id, "another run was offered");
        honest.start(&lease).await?;
        let client = Self::connect(&listener, &identity).await?;
        Ok(Self { stage, listener, honest, honest_identity, lease, identity, client })
    }

    pub(crate) async fn connect(
        listener: &Listener,
        identity: &Identity,
    ) -> anyhow::Result<RunnerServiceClient<Channel>> {
        Ok(RunnerServiceClient::new(Self::channel(listener, identity).await?))
    }

    pub(crate) async fn channel(
        listener: &Listener,
        identity: &Identity,
    ) -> anyhow::Result<Channel> {
        Ok(listener.endpoint(Some(identity))?.connect().await?)
    }

    /// The run as people see it.
    pub(crate) async fn run(&self) -> anyhow::Result<v1::Run> {
        Ok(self.stage.owner.run(&self.lease.run_id).await?)
    }

    /// Fails unless the honest runner is heard and holds what it held.
    pub(crate) async fn honest_goes_on(&mut self) -> anyhow::Result<()> {
        let held = vec![self.lease.clone()];
        self.honest.send(Request::Heartbeat(v1::Heartbeat { held })).await?;
        let renewed = async {
            loop {
                match self.honest.next().await? {
                    Response::Renewed(renewed) => return anyhow::Ok(renewed),
                    Response::Revoke(revoke) => anyhow::bail!("revoked: {}", revoke.reason),
                    _ => {}
                }
            }
        };
        let renewed = tokio::time::timeout(SOON, renewed).await.context("hear a heartbeat")??;
        anyhow::ensure!(renewed.lease == [self.lease.clone()], "renewed is {:?}", renewed.lease);
        let run = self.run().await?;
        anyhow::ensure!(run.state() == RunState::Planning, "the run is {:?}", run.state());
        anyhow::ensure!(
            run.plan.as_ref().is_some_and(|plan| plan.epoch == self.lease.epoch),
            "the plan is {:?}",
            run.plan
        );
        Ok(())
    }

    /// Lets the honest runner end its plan as if nothing had been.
    pub(crate) async fn honest_finishes(&mut self) -> anyhow::Result<v1::Run> {
        let mut client = self.honest.client.clone();
        let log = b"{\"@message\":\"honest\"}\n".to_vec();
        append(&mut client, vec![chunk(Some(&self.lease), 0, &log)]).await?;
        let (workspace, changes) = (b"workspace".as_slice(), b"{}".as_slice());
        for (kind, data) in [(ArtifactKind::Workspace, workspace), (ArtifactKind::Changes, changes)]
        {
            upload(&mut client, header(&self.lease, kind, data), vec![data.to_vec()]).await?;
        }
        let digests = v1::ApprovedPlan {
            plan_digest: sha256(workspace),
            workspace_digest: sha256(workspace),
            lock_file_digest: String::new(),
            changes_digest: sha256(changes),
        };
        let plan = v1::PlanFinished {
            digests: Some(digests),
            applyable: true,
            add: 1,
            terraform_version: "1.11.4".into(),
            ..Default::default()
        };
        let finished = v1::Finished {
            lease: Some(self.lease.clone()),
            log_length: log.len() as u64,
            result: Some(v1::finished::Result::Plan(plan)),
        };
        self.honest.send(Request::Finished(finished)).await?;
        loop {
            match self.honest.next().await? {
                Response::Recorded(_) => break,
                Response::Revoke(revoke) => anyhow::bail!("revoked: {}", revoke.reason),
                _ => {}
            }
        }
        let stored = self.stage.owner.read_log(&self.lease.run_id, Phase::Plan).await?;
        anyhow::ensure!(stored == log, "the log is {:?}", String::from_utf8_lossy(&stored));
        self.run().await
    }

    /// Resident memory of the control plane, in bytes.
    pub(crate) fn memory(&self) -> anyhow::Result<u64> {
        let process = self.stage.plane.process().context("it runs")?;
        let path = format!("/proc/{}/status", process.pid().as_raw_nonzero());
        let status = std::fs::read_to_string(path)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes =
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(kibibytes.context("find VmRSS")? * 1024)
    }
}

async fn enroll(
    stage: &Stage,
    listener: &Listener,
    pool: &str,
    name: &str,
) -> anyhow::Result<Identity> {
    let token = stage.owner.pool_token(pool).await?;
    Identity::enroll(listener.endpoint(None)?.connect().await?, &token, name).await
}

/// A lease stream that says whatever it is told to.
pub(crate) struct Raw {
    pub(crate) frames: mpsc::Sender<v1::LeaseRequest>,
    pub(crate) answers: Streaming<v1::LeaseResponse>,
}

impl Raw {
    /// Opens a stream with any first frame.
    pub(crate) async fn open(
        client: &RunnerServiceClient<Channel>,
        first: Option<Request>,
    ) -> Result<Self, Status> {
        let (frames, outgoing) = mpsc::channel(4096);
        let _ = frames.try_send(v1::LeaseRequest { frame: first });
        let mut client = client.clone().max_encoding_message_size(usize::MAX);
        let answers = client.lease(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Self { frames, answers })
    }

    /// Opens one and is welcomed.
    pub(crate) async fn welcomed(client: &RunnerServiceClient<Channel>) -> Result<Self, Status> {
        let mut raw = Self::open(client, Some(Request::Hello(hello()))).await?;
        match raw.next().await? {
            Response::Welcome(_) => Ok(raw),
            other => Err(Status::internal(format!("no welcome but {other:?}"))),
        }
    }

    pub(crate) async fn send(&self, frame: Option<Request>) {
        // A stream that was ended takes nothing more; its answer tells.
        let _ = self.frames.send(v1::LeaseRequest { frame }).await;
    }

    pub(crate) async fn next(&mut self) -> Result<Response, Status> {
        let answer = tokio::time::timeout(SOON, self.answers.message()).await;
        let message = answer.map_err(|_| Status::deadline_exceeded("no answer"))??;
        let frame = message.and_then(|message| message.frame);
        frame.ok_or_else(|| Status::cancelled("the stream ended without a word"))
    }

    /// Waits for the status that ends the stream.
    pub(crate) async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

pub(crate) fn hello() -> v1::Hello {
    v1::Hello {
        slots: 1,
        engines: vec![v1::Engine { name: "terraform".into(), version: "1.11.4".into() }],
        labels: HashMap::new(),
        version: "0".into(),
        ..Default::default()
    }
}

pub(crate) fn chunk(
    lease: Option<&v1::LeaseRef>,
    offset: u64,
    data: &[u8],
) -> v1::AppendLogRequest {
    v1::AppendLogRequest { lease: lease.cloned(), offset, data: data.to_vec() }
}

/// Appends chunks and answers the last durable length.
pub(crate) async fn append(
    client: &mut RunnerServiceClient<Channel>,
    chunks: Vec<v1::AppendLogRequest>,
) -> Result<u64, Status> {
    let expected = chunks.len();
    let mut answers = client.append_log(tokio_stream::iter(chunks)).await?.into_inner();
    let mut durable = 0;
    for _ in 0..expected {
        let answer = tokio::time::timeout(SOON, answers.message()).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("no answer"))??;
        let answer = answer.ok_or_else(|| Status::cancelled("the stream ended"))?;
        durable = answer.durable_length;
    }
    Ok(durable)
}

pub(crate) fn header(lease: &v1::LeaseRef, kind: ArtifactKind, data: &[u8]) -> v1::ArtifactHeader {
    v1::ArtifactHeader {
        lease: Some(lease.clone()),
        kind: kind.into(),
        digest: sha256(data),
        size: data.len() as u64,
        sequence: 0,
    }
}

pub(crate) async fn upload(
    client: &mut RunnerServiceClient<Channel>,
    header: v1::ArtifactHeader,
    data: Vec<Vec<u8>>,
) -> Result<v1::UploadArtifactResponse, Status> {
    let parts = std::iter::once(Part::Header(header)).chain(data.into_iter().map(Part::Data));
    send_parts(client, parts.map(Some).collect()).await
}

pub(crate) async fn send_parts(
    client: &mut RunnerServiceClient<Channel>,
    parts: Vec<Option<Part>>,
) -> Result<v1::UploadArtifactResponse, Status> {
    let parts = parts.into_iter().map(|part| v1::UploadArtifactRequest { part });
    let mut client = client.clone().max_encoding_message_size(usize::MAX);
    let answer = client.upload_artifact(tokio_stream::iter(parts));
    let answer = tokio::time::timeout(SOON, answer).await;
    Ok(answer.map_err(|_| Status::deadline_exceeded("no answer"))??.into_inner())
}

pub(crate) fn sha256(data: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, data))
}

/// Fails unless a refusal has this code and reason.
#[track_caller]
pub(crate) fn check_refused<T: std::fmt::Debug>(
    what: &str,
    answer: Result<T, Status>,
    code: Code,
    named: &str,
) {
    let status = answer.expect_err(what);
    let found = (status.code(), reason(&status));
    assert_eq!(found, (code, named.to_owned()), "{what}: {status:?}");
}

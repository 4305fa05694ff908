//! The agent against a control plane in the same process, over real TLS and real gRPC, with
//! supervisors of their own and a real terraform.

mod ending;
mod engines;
mod faults;
mod forced;
mod handover;
mod quarantine;
mod quiet;
mod spooling;
mod untaken;
mod whole;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use aws_lc_rs::digest::{SHA256, digest as sha256};
use flate2::Compression;
use flate2::write::GzEncoder;
use latchkey_proto::v1::runner_service_server::{RunnerService, RunnerServiceServer};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair,
};
use tokio::sync::Notify;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Certificate, Identity as ServerIdentity, Server, ServerTlsConfig};
use tonic::{Request as Call, Response as Answer, Status as Refusal, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

use latchkey_proto::v1::lease_response::Frame as Response;

use super::*;
use crate::config::{Lifetime, PoolToken};
use crate::digest;
use crate::engine::{EngineSettings, at_hand};
use crate::job_directory::private_directory;
use crate::spool;
use crate::supervisor::tests::program;

const LIMIT: Duration = Duration::from_secs(60);

const HEARTBEAT: Duration = Duration::from_millis(100);

/// What the control plane of the tests has been told.
#[derive(Default)]
struct World {
    /// What happened, in order.
    story: Vec<String>,
    artifacts: BTreeMap<(i32, u64), Vec<u8>>,
    log: Vec<u8>,
    finished: Option<v1::Finished>,
    offer: Option<v1::Offer>,
    /// Leases that `Welcome` gives up.
    give_up: bool,
    /// Whether `Starting` is answered.
    silent: bool,
    /// Every so many appends fail.
    faulty: bool,
    appends: u32,
    /// Cancels the offered job with the next heartbeat.
    cancel: bool,
    /// By force.
    forces: bool,
    refuses_state: bool,
    /// Answers everything about leases with LEASE_LOST, and renews none.
    loses_leases: bool,
    /// Renews all the same: like a control plane that was never told of the lease.
    renews_lost_leases: bool,
    /// Takes what a lost lease left.
    quarantines: bool,
    /// Refuses the lease stream with HISTORY_LOST.
    is_old: bool,
    /// What `Welcome` and `Renewed` tell, and every `Hello` told.
    generation: u64,
    history: u64,
    hellos: Vec<v1::Hello>,
    /// Says `Drain` behind each `Welcome`.
    drains: bool,
    /// Goes on offering to a runner that says it takes nothing.
    offers_all_the_same: bool,
    /// Answers `Finished` as of a lease that is lost.
    revokes_finished: bool,
    /// Takes no uploads for now.
    is_full: bool,
    /// Keeps who fetches waiting.
    holds_back: bool,
    /// Of logs: how many were opened, and how many of these their runner has closed.
    log_streams: u32,
    log_streams_closed: u32,
}

#[derive(Clone)]
struct Plane {
    world: Arc<Mutex<World>>,
    changed: Arc<Notify>,
    cut: watch::Sender<u32>,
    ca: Arc<(CertificateParams, KeyPair, Vec<u8>)>,
    port: u16,
}

type Stream1<T> = Pin<Box<dyn Stream<Item = Result<T, Refusal>> + Send>>;

impl World {
    fn mark(&self) -> Option<v1::HistoryMark> {
        let (generation, history) = (self.generation.max(1), self.history);
        Some(v1::HistoryMark { generation, incarnation: "a".repeat(32), history, mac: vec![1; 32] })
    }
}

impl Plane {
    async fn start() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap();
        let leaf_key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&params, &key);
        let leaf = CertificateParams::new(vec!["127.0.0.1".into()])
            .unwrap()
            .signed_by(&leaf_key, &issuer)
            .unwrap();
        let chain = format!("{}{}", leaf.pem(), ca.pem());
        let tls = ServerTlsConfig::new()
            .identity(ServerIdentity::from_pem(chain, leaf_key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(ca.pem()))
            .client_auth_optional(true);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ca_der = ca.der().to_vec();
        let plane = Self {
            world: Arc::default(),
            changed: Arc::default(),
            cut: watch::channel(0).0,
            ca: Arc::new((params, key, ca_der)),
            port,
        };
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(RunnerServiceServer::new(plane.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        plane
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn note(&self, what: impl Into<String>) {
        self.world().story.push(what.into());
        self.changed.notify_waiters();
    }

    #[track_caller]
    fn story(&self) -> Vec<String> {
        let story = self.world().story.clone();
        story.into_iter().filter(|what| what != "heartbeat").collect()
    }

    async fn wait(&self, what: &str, reached: impl Fn(&World) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if reached(&self.world()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            let log = String::from_utf8_lossy(&self.world().log).into_owned();
            panic!("waited too long for {what}: {:?}\n{log}", self.story());
        }
    }

    async fn finished(&self) -> v1::Finished {
        self.wait("the end", |world| world.finished.is_some()).await;
        self.world().finished.take().unwrap()
    }

    /// Waits for a decline, and answers its reason.
    async fn declined(&self) -> String {
        let declines = |world: &World| {
            world.story.iter().find_map(|what| what.strip_prefix("decline: ").map(str::to_owned))
        };
        self.wait("a decline", |world| declines(world).is_some()).await;
        declines(&self.world()).unwrap()
    }

    fn config(&self, work_dir: &Path) -> Config {
        let fingerprint = sha256(&SHA256, &self.ca.2).as_ref().try_into().unwrap();
        let engine = at_hand().unwrap().display().to_string();
        Config {
            control_plane: format!("https://127.0.0.1:{}", self.port).parse().unwrap(),
            host: "127.0.0.1".into(),
            work_dir: work_dir.to_owned(),
            pool_token: Some(PoolToken { secret: "lkp_secret".into(), fingerprint }),
            name: "builder".into(),
            slots: 1,
            engines: EngineSettings::of(&["--terraform", &engine, "--no-engine-install"], work_dir),
            provider_cache: work_dir.join("providers"),
            provider_cache_limit: 10 << 30,
            pass_env: Vec::new(),
            terraform_cli_config: None,
            longest_log: 256 << 20,
            spool: spool::Limits { spool: 4 << 30, low_water: 0 },
            labels: BTreeMap::new(),
            accepts: None,
            on_sigterm: OnSigterm::Drain,
            idle_timeout: None,
            confinement: Default::default(),
            hooks: Default::default(),
            lifetime: Lifetime::UntilStopped,
            program: program(),
        }
    }

    /// Offers a job with the next connection, or at once with the present one after a cut.
    fn offer(&self, phase: v1::Phase, epoch: u64, job: v1::JobSpec) {
        let lease =
            v1::LeaseRef { run_id: "run1".into(), phase: phase.into(), epoch, generation: 1 };
        let mut world = self.world();
        world.log.clear();
        world.finished = None;
        world.offer = Some(v1::Offer { lease: Some(lease), job: Some(job) });
        drop(world);
        self.cut();
    }

    fn cut(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    fn artifact(&self, kind: v1::ArtifactKind, sequence: u64) -> Vec<u8> {
        self.world().artifacts.get(&(kind.into(), sequence)).cloned().unwrap_or_default()
    }

    fn put(&self, kind: v1::ArtifactKind, data: Vec<u8>) {
        self.world().artifacts.insert((kind.into(), 0), data);
    }
}

fn certified<T>(call: &Call<T>) -> Result<(), Refusal> {
    match call.peer_certs() {
        Some(_) => Ok(()),
        None => Err(Refusal::unauthenticated("no client certificate")),
    }
}

#[tonic::async_trait]
impl RunnerService for Plane {
    async fn enroll(
        &self,
        call: Call<v1::EnrollRequest>,
    ) -> Result<Answer<v1::EnrollResponse>, Refusal> {
        let request = call.into_inner();
        if request.pool_token != "lkp_secret" {
            return Err(Refusal::unauthenticated("the pool token is unknown"));
        }
        let csr = request.certificate_request.as_slice().into();
        let csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let issuer = Issuer::from_params(&self.ca.0, &self.ca.1);
        let certificate = csr.signed_by(&issuer).unwrap().der().to_vec();
        self.note("enroll");
        let ca_certificate = self.ca.2.clone();
        let runner_id = "runner-1".into();
        Ok(Answer::new(v1::EnrollResponse { runner_id, certificate, ca_certificate }))
    }

    type LeaseStream = Stream1<v1::LeaseResponse>;

    async fn lease(
        &self,
        call: Call<Streaming<v1::LeaseRequest>>,
    ) -> Result<Answer<Self::LeaseStream>, Refusal> {
        certified(&call)?;
        if self.world().is_old {
            self.note("refused");
            let details = ErrorDetails::with_error_info("HISTORY_LOST", "latchkey", HashMap::new());
            let text = "restore it";
            return Err(Refusal::with_error_details(
                tonic::Code::FailedPrecondition,
                text,
                details,
            ));
        }
        let mut inbound = call.into_inner();
        let (to, answers) = mpsc::channel(16);
        let plane = self.clone();
        let mut cut = self.cut.subscribe();
        tokio::spawn(async move {
            let send = async |frame| {
                let _ = to.send(Ok(v1::LeaseResponse { frame: Some(frame) })).await;
            };
            let mut offered = false;
            let mut draining = false;
            loop {
                let frame = tokio::select! {
                    message = inbound.next() => match message {
                        Some(Ok(message)) => message.frame.unwrap(),
                        Some(Err(_)) | None => return,
                    },
                    _ = cut.changed() => return plane.note("cut"),
                };
                match frame {
                    Request::Hello(hello) => {
                        plane.note(format!("hello holding {}", hello.held.len()));
                        draining = hello.draining;
                        let (give_up, offer, generation, history, drains) = {
                            let mut world = plane.world();
                            world.hellos.push(hello.clone());
                            let generation = world.generation.max(1);
                            let offer = world.offer.clone();
                            (world.give_up, offer, generation, world.mark(), world.drains)
                        };
                        let (keep, give_up) = if give_up {
                            (vec![], hello.held.clone())
                        } else {
                            (hello.held.clone(), vec![])
                        };
                        send(Response::Welcome(v1::Welcome {
                            runner_id: "runner-1".into(),
                            generation,
                            heartbeat_interval: Some(prost_types::Duration {
                                seconds: 0,
                                nanos: HEARTBEAT.subsec_nanos().cast_signed(),
                            }),
                            keep,
                            give_up,
                            history,
                        }))
                        .await;
                        if drains {
                            send(Response::Drain(v1::Drain {})).await;
                        }
                        // With the runner's only slot taken, it waits for a heartbeat.
                        let idle = hello.held.is_empty() && !draining;
                        if let (true, Some(offer)) = (idle, offer) {
                            offered = true;
                            send(Response::Offer(offer)).await;
                        }
                    }
                    Request::Accept(_) => plane.note("accept"),
                    Request::Decline(decline) => {
                        plane.world().offer = None;
                        plane.note(format!("decline: {}", decline.reason));
                        let (lease, reason) = (decline.lease, decline.reason);
                        send(Response::Revoke(v1::Revoke { lease, reason })).await;
                    }
                    Request::Starting(starting) => {
                        plane.note("starting");
                        if !plane.world().silent {
                            let credentials = Some(v1::SessionCredentials {
                                access_key_id: "ASIACANARY".into(),
                                secret_access_key: "canary-secret".into(),
                                session_token: "canary-token".into(),
                                expire_time: None,
                            });
                            let lease = starting.lease;
                            let history = plane.world().mark();
                            let variables = vec![];
                            let go = v1::Go { lease, credentials, variables, history };
                            send(Response::Go(go)).await;
                        }
                    }
                    Request::Heartbeat(heartbeat) => {
                        plane.note("heartbeat");
                        let force = plane.world().forces;
                        let (offer, cancel, lost, history, all_the_same) = {
                            let world = plane.world();
                            let lost = world.loses_leases && !world.renews_lost_leases;
                            let all_the_same = world.offers_all_the_same;
                            (world.offer.clone(), world.cancel, lost, world.mark(), all_the_same)
                        };
                        let held = offer.is_some() && !lost;
                        let idle = heartbeat.held.is_empty() && (!draining || all_the_same);
                        if let (true, false, Some(offer)) = (idle, offered, offer.clone()) {
                            offered = true;
                            send(Response::Offer(offer)).await;
                        }
                        if let (true, Some(offer)) = (cancel, offer) {
                            let lease = offer.lease;
                            send(Response::Cancel(v1::CancelJob { lease, force })).await;
                        }
                        let lease = if held { heartbeat.held } else { vec![] };
                        send(Response::Renewed(v1::Renewed { lease, history })).await;
                    }
                    Request::Finished(finished) => {
                        let lease = finished.lease.clone();
                        {
                            let mut world = plane.world();
                            // A repeat of an earlier job's, after a cut, changes nothing.
                            if world.offer.as_ref().is_some_and(|offer| offer.lease == lease) {
                                world.offer = None;
                                world.finished = Some(finished);
                            }
                        }
                        plane.note("finished");
                        if plane.world().revokes_finished {
                            let reason = "the lease is lost".into();
                            send(Response::Revoke(v1::Revoke { lease, reason })).await;
                        } else {
                            send(Response::Recorded(v1::Recorded { lease })).await;
                        }
                    }
                    // Not acknowledged: the lease is merely no longer renewed.
                    Request::NeverStarted(_) => {
                        plane.world().offer = None;
                        plane.note("never started");
                    }
                    Request::Draining(v1::Draining {}) => {
                        draining = true;
                        plane.note("draining");
                    }
                    Request::Again(again) => {
                        plane.note("again");
                        send(Response::Go(v1::Go { lease: again.lease, ..Default::default() }))
                            .await;
                    }
                }
            }
        });
        Ok(Answer::new(Box::pin(ReceiverStream::new(answers))))
    }

    type FetchArtifactStream = Stream1<v1::FetchArtifactResponse>;

    async fn fetch_artifact(
        &self,
        call: Call<v1::FetchArtifactRequest>,
    ) -> Result<Answer<Self::FetchArtifactStream>, Refusal> {
        certified(&call)?;
        self.note("fetch");
        self.wait("the data", |world| !world.holds_back).await;
        let data = self.artifact(call.into_inner().kind(), 0);
        let pieces: Vec<_> = data
            .chunks(1000)
            .map(|data| Ok(v1::FetchArtifactResponse { data: data.to_vec() }))
            .collect();
        Ok(Answer::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn upload_artifact(
        &self,
        call: Call<Streaming<v1::UploadArtifactRequest>>,
    ) -> Result<Answer<v1::UploadArtifactResponse>, Refusal> {
        certified(&call)?;
        use v1::upload_artifact_request::Part;
        let mut parts = call.into_inner();
        let Some(Part::Header(header)) = parts.next().await.unwrap()?.part else {
            return Err(Refusal::invalid_argument("the header comes first"));
        };
        let mut data = Vec::new();
        while let Some(part) = parts.next().await {
            match part?.part.unwrap() {
                Part::Data(more) => data.extend(more),
                Part::Header(_) => return Err(Refusal::invalid_argument("one header")),
            }
        }
        assert_eq!(header.digest, digest::of_bytes(&data));
        assert_eq!(header.size, data.len() as u64);
        let kind = header.kind();
        if self.world().is_full {
            self.note("full");
            return Err(Refusal::unavailable("the disk is full"));
        }
        if self.world().loses_leases && !self.world().quarantines {
            self.note(format!("lost {}", kind.as_str_name()));
            return Err(lease_lost());
        }
        if kind == v1::ArtifactKind::State && self.world().refuses_state {
            let details = ErrorDetails::with_error_info("WRONG_STATE", "latchkey", HashMap::new());
            let text = "the state does not continue the environment's";
            return Err(Refusal::with_error_details(
                tonic::Code::FailedPrecondition,
                text,
                details,
            ));
        }
        self.world().artifacts.insert((kind.into(), header.sequence), data);
        self.note(format!("uploaded {} {}", kind.as_str_name(), header.sequence));
        Ok(Answer::new(v1::UploadArtifactResponse { quarantined: false }))
    }

    type AppendLogStream = Stream1<v1::AppendLogResponse>;

    async fn append_log(
        &self,
        call: Call<Streaming<v1::AppendLogRequest>>,
    ) -> Result<Answer<Self::AppendLogStream>, Refusal> {
        certified(&call)?;
        let plane = self.clone();
        let mut first = true;
        plane.world().log_streams += 1;
        let closed = self.clone();
        // Not reached by a stream that breaks: that ends with an error.
        let end = tokio_stream::once(()).filter_map(move |()| {
            closed.world().log_streams_closed += 1;
            closed.changed.notify_waiters();
            None
        });
        let answers = call.into_inner().map(move |message| {
            let message = message?;
            assert_eq!(message.lease.is_some(), std::mem::take(&mut first));
            assert!(message.data.len() <= 256 * 1024 && message.data.ends_with(b"\n"));
            let mut world = plane.world();
            world.appends += 1;
            if world.loses_leases {
                return Err(lease_lost());
            }
            if world.faulty && world.appends.is_multiple_of(3) {
                return Err(Refusal::unavailable("a planned fault"));
            }
            let (offset, end) =
                (message.offset as usize, message.offset as usize + message.data.len());
            if offset > world.log.len() {
                let metadata = [("expected".to_owned(), world.log.len().to_string())];
                let details = ErrorDetails::with_error_info("LOG_OFFSET", "latchkey", metadata);
                let text = "a gap in the log";
                return Err(Refusal::with_error_details(
                    tonic::Code::FailedPrecondition,
                    text,
                    details,
                ));
            }
            let stored = world.log.len().min(end);
            assert_eq!(
                world.log[offset..stored],
                message.data[..stored - offset],
                "told bytes changed"
            );
            world.log.extend_from_slice(&message.data[stored - offset..]);
            let durable_length = world.log.len() as u64;
            // The fault that hurts most: stored, but the answer is lost.
            if world.faulty && world.appends % 5 == 4 {
                return Err(Refusal::unavailable("another planned fault"));
            }
            drop(world);
            plane.changed.notify_waiters();
            Ok(v1::AppendLogResponse { durable_length })
        });
        let answers = answers.chain(end);
        Ok(Answer::new(Box::pin(answers)))
    }
}

fn lease_lost() -> Refusal {
    let details = ErrorDetails::with_error_info("LEASE_LOST", "latchkey", HashMap::new());
    Refusal::with_error_details(tonic::Code::FailedPrecondition, "lost", details)
}

/// An agent in this process, which can be told to end like one that gets signals.
struct Running {
    wish: watch::Sender<Wish>,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Running {
    fn start(config: Config) -> Self {
        let (wish_to, wish) = watch::channel(Wish::Stay);
        // A runtime of its own: what is left of a stopped agent ends with it, as with a process.
        let task = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            let done = runtime.block_on(serve(config, wish));
            runtime.shutdown_background();
            done
        });
        Self { wish: wish_to, task }
    }

    /// Stops it at once; its jobs go on.
    async fn stop(self) -> Result<(), Error> {
        self.wish.send_replace(Wish::Leave);
        self.ended().await
    }

    fn wish(&self, wish: Wish) {
        self.wish.send_replace(wish);
    }

    async fn ended(self) -> Result<(), Error> {
        let Self { wish, task } = self;
        let ended = tokio::time::timeout(LIMIT, task).await.expect("the agent leaves").unwrap();
        drop(wish);
        ended
    }
}

fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn plan_job(archive: &[u8]) -> v1::JobSpec {
    v1::JobSpec {
        organization: "acme".into(),
        environment: "prod".into(),
        kind: v1::RunKind::PlanAndApply.into(),
        archive_digest: digest::of_bytes(archive),
        ..Default::default()
    }
}

fn apply_job(digests: v1::ApprovedPlan) -> v1::JobSpec {
    v1::JobSpec {
        archive_digest: digests.workspace_digest.clone(),
        approved: Some(digests),
        ..plan_job(&[])
    }
}

fn jobs_left(work_dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(work_dir.join("jobs")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Empty where the host keeps it from us.
fn names_in_the_environment_of_the_supervisor(directory: &Path) -> Vec<String> {
    let tail = format!("supervise\0{}\0", directory.display());
    let mut processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let supervisor = processes
        .find(|process| {
            let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
            command.ends_with(tail.as_bytes())
        })
        .expect("the supervisor lives");
    let environment = std::fs::read(supervisor.join("environ")).unwrap_or_default();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let pairs = environment.split('\0').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, _)| name.to_owned()).collect()
}

const MAIN: &str = r#"
resource "terraform_data" "x" {
  input = "value"
  provisioner "local-exec" {
    command = "echo begun; sleep ${file("${path.module}/seconds")}; for n in 1 2 3 4 5 6 7 8 9; do echo line $n; sleep 0.03; done"
  }
}
output "x" { value = terraform_data.x.output }
"#;

async fn plan(plane: &Plane, seconds: &str) -> v1::ApprovedPlan {
    let configuration = archive(&[("main.tf", MAIN), ("seconds", seconds)]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    let finished = plane.finished().await;
    assert_eq!(finished.log_length, plane.world().log.len() as u64);
    let Some(v1::finished::Result::Plan(plan)) = finished.result else {
        panic!("{finished:?}\n{}", String::from_utf8_lossy(&plane.world().log));
    };
    assert!(plan.applyable && plan.add == 1 && !plan.terraform_version.is_empty());
    let digests = plan.digests.unwrap();
    let workspace = plane.artifact(v1::ArtifactKind::Workspace, 0);
    assert_eq!(digest::of_bytes(&workspace), digests.workspace_digest);
    let changes = plane.artifact(v1::ArtifactKind::Changes, 0);
    assert_eq!(digest::of_bytes(&changes), digests.changes_digest);
    digests
}

//! `queue --watch` against a control plane of the test's own: real gRPC over loopback, codes from
//! a pipe.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Cursor, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

use latchkey_cli::{Exit, Stdin, Streams, run_with};
use latchkey_proto::ERROR_DOMAIN;
use latchkey_proto::v1;
use latchkey_proto::v1::run_service_server::{RunService, RunServiceServer};
use latchkey_proto::v1::upload_configuration_request::Part;
use latchkey_proto::v1::{Lock, Phase, Reason, RunState};

const WRONG: &str = "000000";
const PLAN_CODE: &str = "111111";
const APPLY_CODE: &str = "222222";

const PLAN_LOG: &str = concat!(
    "{\"@message\":\"Terraform 1.13.0\",\"type\":\"version\"}\n",
    "{\"@message\":\"  + terraform_data.x\",\"type\":\"plan_text\"}\n",
);
const APPLY_LOG: &str = "{\"@message\":\"terraform_data.x: Creation complete\"}\n";

/// A control plane that knows one run.
struct Fake {
    run: watch::Sender<v1::Run>,
    submitted: Mutex<Vec<v1::AuthenticateRequest>>,
    uploaded: Mutex<Vec<u8>>,
    tokens: Mutex<Vec<String>>,
    /// Answers that are lost on the way, still to come.
    lost_answers: Mutex<u32>,
    log_reads: Mutex<Vec<(Phase, u64)>>,
}

impl Fake {
    fn new() -> Fake {
        let run = v1::Run {
            run_id: "run-1".into(),
            organization: "acme".into(),
            environment: "prod".into(),
            kind: v1::RunKind::PlanAndApply.into(),
            state: RunState::AwaitingPlanMfa.into(),
            lock: Lock::CodeRequired.into(),
            mfa_policy: v1::MfaPolicy::PlansAndApplies.into(),
            update_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        Fake {
            run: watch::Sender::new(run),
            submitted: Mutex::default(),
            uploaded: Mutex::default(),
            tokens: Mutex::default(),
            lost_answers: Mutex::default(),
            log_reads: Mutex::default(),
        }
    }

    fn change(&self, change: impl FnOnce(&mut v1::Run)) -> v1::Run {
        self.run.send_modify(|run| {
            change(run);
            run.update_time.as_mut().unwrap().seconds += 1;
        });
        self.run.borrow().clone()
    }

    fn accept(run: &mut v1::Run, phase: Phase) {
        let facts = v1::JobFacts {
            epoch: 1,
            start_time: run.update_time,
            authenticated: Some(v1::Authenticated { user: "alice".into(), ..Default::default() }),
            ..Default::default()
        };
        run.lock = Lock::Authenticated.into();
        run.last_refusal = None;
        if phase == Phase::Plan {
            run.state = RunState::Planning.into();
            run.plan = Some(facts);
        } else {
            run.state = RunState::Applying.into();
            run.apply = Some(facts);
        }
    }

    fn planned(run: &mut v1::Run) {
        run.state = RunState::AwaitingApplyMfa.into();
        run.lock = Lock::CodeRequired.into();
        run.plan_result = Some(v1::Plan {
            add: 1,
            applyable: true,
            digest: "digest-1".into(),
            ..Default::default()
        });
    }

    fn applied(run: &mut v1::Run) {
        run.state = RunState::Applied.into();
        run.outputs_json = r#"{"name":{"sensitive":false,"value":"x"}}"#.into();
    }
}

fn refuse(reason: Reason, message: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason.name(), ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(Code::FailedPrecondition, message, details)
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Service(Arc<Fake>);

#[tonic::async_trait]
impl RunService for Service {
    type WatchRunStream = Answers<v1::WatchRunResponse>;
    type ReadLogStream = Answers<v1::ReadLogResponse>;

    async fn upload_configuration(
        &self,
        request: Request<Streaming<v1::UploadConfigurationRequest>>,
    ) -> Result<Response<v1::UploadConfigurationResponse>, Status> {
        let token = request.metadata().get("authorization").unwrap().to_str().unwrap();
        self.0.tokens.lock().unwrap().push(token.to_owned());
        let mut parts = request.into_inner();
        while let Some(part) = parts.message().await? {
            match part.part.unwrap() {
                Part::Header(header) => assert_eq!(header.environment, "prod"),
                Part::Data(data) => self.0.uploaded.lock().unwrap().extend(data),
            }
        }
        let configuration_digest = "configuration-1".into();
        Ok(Response::new(v1::UploadConfigurationResponse { configuration_digest }))
    }

    async fn queue_run(
        &self,
        request: Request<v1::QueueRunRequest>,
    ) -> Result<Response<v1::QueueRunResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.configuration_digest, "configuration-1");
        assert_eq!(request.organization, "acme");
        let run = Some(self.0.run.borrow().clone());
        Ok(Response::new(v1::QueueRunResponse { run }))
    }

    async fn watch_run(
        &self,
        _: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let runs = WatchStream::new(self.0.run.subscribe());
        let runs = runs.map(|run| Ok(v1::WatchRunResponse { run: Some(run) }));
        Ok(Response::new(Box::pin(runs)))
    }

    async fn top_up(
        &self,
        _: Request<v1::TopUpRequest>,
    ) -> Result<Response<v1::TopUpResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn authenticate(
        &self,
        request: Request<v1::AuthenticateRequest>,
    ) -> Result<Response<v1::AuthenticateResponse>, Status> {
        let request = request.into_inner();
        let repeated = {
            let mut submitted = self.0.submitted.lock().unwrap();
            let same = |earlier: &v1::AuthenticateRequest| earlier.request_id == request.request_id;
            let repeated = submitted.iter().any(same);
            submitted.push(request.clone());
            repeated
        };
        let run = match request.token_code.as_str() {
            _ if repeated => self.0.run.borrow().clone(),
            WRONG => {
                self.0.change(|run| {
                    run.lock = Lock::Failed.into();
                    run.last_refusal = Some(v1::AuthenticationRefusal {
                        reason: Reason::CodeRejected.name().into(),
                        message: "AWS did not accept the code".into(),
                        ..Default::default()
                    });
                });
                return Err(refuse(Reason::CodeRejected, "AWS did not accept the code"));
            }
            PLAN_CODE => self.0.change(|run| Fake::accept(run, Phase::Plan)),
            APPLY_CODE => self.0.change(|run| Fake::accept(run, Phase::Apply)),
            other => panic!("an unknown code {other}"),
        };
        let mut lost = self.0.lost_answers.lock().unwrap();
        if *lost > 0 {
            *lost -= 1;
            return Err(Status::unavailable("connection reset"));
        }
        let authentication_id = "authentication-1".into();
        Ok(Response::new(v1::AuthenticateResponse { run: Some(run), authentication_id }))
    }

    async fn read_log(
        &self,
        request: Request<v1::ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let request = request.into_inner();
        let (phase, offset) = (request.phase(), request.offset);
        self.0.log_reads.lock().unwrap().push((phase, offset));
        let piece = |log: &str, range: std::ops::Range<usize>| {
            let data = log.as_bytes()[range.clone()].to_vec();
            Ok(v1::ReadLogResponse { offset: range.start as u64, data })
        };
        if phase == Phase::Plan && offset == 0 {
            // The connection breaks in the middle of a line.
            let begin = vec![piece(PLAN_LOG, 0..30), Err(Status::unavailable("reset"))];
            return Ok(Response::new(Box::pin(tokio_stream::iter(begin))));
        }
        let (log, after): (&str, fn(&mut v1::Run)) = match phase {
            Phase::Plan => (PLAN_LOG, Fake::planned),
            _ => (APPLY_LOG, Fake::applied),
        };
        self.0.change(after);
        let rest = vec![piece(log, offset as usize..log.len())];
        Ok(Response::new(Box::pin(tokio_stream::iter(rest))))
    }

    async fn retry_run(
        &self,
        _: Request<v1::RetryRunRequest>,
    ) -> Result<Response<v1::RetryRunResponse>, Status> {
        Err(Status::unimplemented("not in this story"))
    }

    async fn get_run(
        &self,
        _: Request<v1::GetRunRequest>,
    ) -> Result<Response<v1::GetRunResponse>, Status> {
        let run = Some(self.0.run.borrow().clone());
        Ok(Response::new(v1::GetRunResponse { run }))
    }

    async fn list_runs(
        &self,
        _: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn confirm(
        &self,
        _: Request<v1::ConfirmRequest>,
    ) -> Result<Response<v1::ConfirmResponse>, Status> {
        Err(refuse(Reason::MfaRequired, "a token code is required"))
    }

    async fn discard(
        &self,
        _: Request<v1::DiscardRequest>,
    ) -> Result<Response<v1::DiscardResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn cancel(
        &self,
        _: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Story {
    fake: Arc<Fake>,
    directory: tempfile::TempDir,
}

struct Told {
    exit: Exit,
    out: String,
    err: String,
}

impl Story {
    async fn start() -> Story {
        let fake = Arc::new(Fake::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(RunServiceServer::new(Service(fake.clone())));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

        let directory = tempfile::tempdir().unwrap();
        let story = Story { fake, directory };
        let credentials = serde_json::json!({
            "address": address, "token": "lku_canary", "organization": "acme",
            "insecure_plaintext": true,
        });
        std::fs::write(story.config(), credentials.to_string()).unwrap();
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(story.config(), mode).unwrap();
        std::fs::create_dir(story.directory.path().join("root")).unwrap();
        std::fs::write(story.directory.path().join("root/main.tf"), "# x\n").unwrap();
        story
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("credentials.json")
    }

    async fn run(&self, args: &[&str], stdin: &str) -> Told {
        let (out, err) = (Shared::default(), Shared::default());
        let mut all: Vec<OsString> = vec!["latchkey".into(), "--config".into()];
        all.push(self.config().into());
        all.extend(args.iter().map(OsString::from));
        let streams = Streams {
            stdin: Stdin::Lines(Box::new(Cursor::new(stdin.to_owned()))),
            stdout: Box::new(out.clone()),
            stderr: Box::new(err.clone()),
        };
        let exit = tokio::time::timeout(Duration::from_secs(30), run_with(all, streams))
            .await
            .unwrap_or_else(|_| panic!("no end; seen: {}\n{}", out.text(), err.text()));
        Told { exit, out: out.text(), err: err.text() }
    }

    async fn queue(&self, stdin: &str, more: &[&str]) -> Told {
        let root = self.directory.path().join("root");
        let mut args = vec!["queue", "prod", root.to_str().unwrap(), "--watch"];
        args.extend(more);
        self.run(&args, stdin).await
    }

    fn submitted(&self) -> Vec<v1::AuthenticateRequest> {
        self.fake.submitted.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn a_wrong_code_then_right_ones_lead_to_the_end_and_go_out_once_each() {
    let story = Story::start().await;
    let told = story.queue("000000\n111111\n222222\n", &[]).await;
    assert_eq!(told.exit, Exit::Ok, "{}", told.err);

    let submitted = story.submitted();
    let codes: Vec<&str> = submitted.iter().map(|request| request.token_code.as_str()).collect();
    assert_eq!(codes, [WRONG, PLAN_CODE, APPLY_CODE]);
    let phases: Vec<Phase> = submitted.iter().map(v1::AuthenticateRequest::phase).collect();
    assert_eq!(phases, [Phase::Plan, Phase::Plan, Phase::Apply]);
    assert_eq!(submitted[2].plan_digest, "digest-1");
    let mut ids: Vec<&str> = submitted.iter().map(|request| request.request_id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3);

    // The logs whole, in order, though the connection broke; then the outputs.
    assert_eq!(
        told.out,
        "Terraform 1.13.0\n  + terraform_data.x\nterraform_data.x: Creation complete\n\
         Outputs:\n  name = \"x\"\n"
    );
    let reads = story.fake.log_reads.lock().unwrap().clone();
    assert_eq!(reads, [(Phase::Plan, 0), (Phase::Plan, 30), (Phase::Apply, 0)]);
    assert_eq!(told.err.matches("AWS did not accept the code").count(), 1, "{}", told.err);
    assert!(told.err.contains("CODE_REJECTED") && told.err.contains("hint:"), "{}", told.err);
    assert_eq!(told.err.matches("Authenticated with MFA by alice").count(), 2, "{}", told.err);
    assert!(told.err.contains("Plan: 1 to add, 0 to change, 0 to destroy"), "{}", told.err);
    for secret in [WRONG, PLAN_CODE, APPLY_CODE, "canary"] {
        assert!(!told.err.contains(secret) && !told.out.contains(secret), "{secret}");
    }
    assert_eq!(*story.fake.tokens.lock().unwrap(), ["Bearer lku_canary"]);
    assert!(!story.fake.uploaded.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_code_without_an_answer_is_repeated_under_the_same_request_id() {
    let story = Story::start().await;
    *story.fake.lost_answers.lock().unwrap() = 1;
    let told = story.queue("111111\n222222\n", &[]).await;
    assert_eq!(told.exit, Exit::Ok, "{}", told.err);
    let submitted = story.submitted();
    assert_eq!(submitted.len(), 3);
    assert_eq!(submitted[0].request_id, submitted[1].request_id);
    assert_eq!(submitted[0].token_code, submitted[1].token_code);
    assert_ne!(submitted[1].request_id, submitted[2].request_id);
}

#[tokio::test]
async fn without_anybody_to_ask_the_run_is_left_waiting() {
    let story = Story::start().await;
    let told = story.queue("", &[]).await;
    assert_eq!(told.exit, Exit::WaitsForPerson, "{}", told.err);
    assert!(told.err.contains("hint: latchkey authenticate run-1"), "{}", told.err);
    assert!(story.submitted().is_empty());
}

#[tokio::test]
async fn what_is_no_code_never_leaves() {
    let story = Story::start().await;
    let told = story.queue("hunter2\n12345\n1234567\n", &[]).await;
    assert_eq!(told.exit, Exit::WaitsForPerson);
    assert!(story.submitted().is_empty());
    assert!(told.err.contains("six digits") && !told.err.contains("hunter2"), "{}", told.err);
}

#[tokio::test]
async fn programs_get_one_event_a_line() {
    let story = Story::start().await;
    let told = story.queue("111111\n222222\n", &["-o", "json"]).await;
    assert_eq!(told.exit, Exit::Ok, "{}", told.err);
    let events: Vec<serde_json::Value> =
        told.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let logs: Vec<&serde_json::Value> =
        events.iter().filter(|event| event["event"] == "log").collect();
    assert_eq!(logs.len(), 3);
    assert_eq!(logs[0]["line"]["type"], "version");
    assert_eq!(logs[2]["phase"], "apply");
    assert_eq!(events[0]["run"]["state"], "awaiting_plan_mfa");
    let last = events.iter().rfind(|event| event["event"] == "run").unwrap();
    assert_eq!(last["run"]["state"], "applied");
    assert_eq!(last["run"]["outputs"]["name"]["value"], "x");
}

#[tokio::test]
async fn one_code_is_submitted_for_the_plan_that_was_shown() {
    let story = Story::start().await;
    story.fake.change(Fake::planned);
    let told = story.run(&["authenticate", "run-1"], "222222\n").await;
    assert_eq!(told.exit, Exit::Ok, "{}", told.err);
    assert_eq!(story.submitted()[0].plan_digest, "digest-1");
    assert_eq!(story.submitted()[0].phase(), Phase::Apply);
    assert!(told.err.contains("This plan will be applied"), "{}", told.err);
    assert!(told.out.contains("Authenticated with MFA by alice"), "{}", told.out);

    let again = story.run(&["authenticate", "run-1"], "222222\n").await;
    assert_eq!(again.exit, Exit::Refused);
    assert!(again.err.contains("NOT_AWAITING_CODE"), "{}", again.err);
    assert_eq!(story.submitted().len(), 1);
}

#[tokio::test]
async fn a_refused_confirmation_names_the_command_that_helps() {
    let story = Story::start().await;
    story.fake.change(Fake::planned);
    let told = story.run(&["confirm", "run-1", "-o", "json"], "").await;
    assert_eq!(told.exit, Exit::Refused);
    let error: serde_json::Value = serde_json::from_str(&told.err).unwrap();
    assert_eq!(error["error"]["reason"], "mfa_required");
    assert!(error["error"]["hint"].as_str().unwrap().contains("latchkey authenticate"));
}

#[tokio::test]
async fn nobody_signed_in_and_nobody_there_have_codes_of_their_own() {
    let story = Story::start().await;
    let credentials = serde_json::json!({
        "address": "http://127.0.0.1:1", "token": "t", "insecure_plaintext": true,
    });
    std::fs::write(story.config(), credentials.to_string()).unwrap();
    let told = story.run(&["run", "show", "run-1"], "").await;
    assert_eq!(told.exit, Exit::Unreachable, "{}", told.err);
    std::fs::remove_file(story.config()).unwrap();
    let told = story.run(&["run", "show", "run-1"], "").await;
    assert_eq!(told.exit, Exit::NotSignedIn);
    assert!(told.err.contains("hint: sign in"), "{}", told.err);
    assert_eq!(story.run(&["run", "explode"], "").await.exit, Exit::Usage);
    let help = story.run(&["--help"], "").await;
    assert_eq!(help.exit, Exit::Ok);
    assert!(help.out.contains("Exit codes:"), "{}", help.out);
}

#[tokio::test]
async fn ctrl_c_leaves_the_run_and_says_how_to_come_back() {
    let story = Story::start().await;
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_latchkey"))
        .arg("--config")
        .arg(story.config())
        .args(["queue", "prod", "--watch"])
        .arg(story.directory.path().join("root"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = Vec::new();
    let told = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("the next line of standard input") {
                let id = Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
                kill_process(id, Signal::INT).unwrap();
            }
            seen.push(line);
        }
    };
    tokio::time::timeout(Duration::from_secs(30), told).await.unwrap();
    let seen = seen.join("\n");
    assert_eq!(child.wait().await.unwrap().code(), Some(130), "{seen}");
    assert!(seen.contains("run run-1 goes on"), "{seen}");
    assert!(seen.contains("latchkey run watch run-1"), "{seen}");
    assert!(story.submitted().is_empty());
}

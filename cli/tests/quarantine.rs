//! `quarantine` against a control plane of the test's own: nothing is overwritten, nobody else
//! reads what is downloaded, and a state is accepted by the name that was typed.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use std::io::{self, Cursor, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::Iter;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use latchkey_cli::{Exit, Stdin, Streams, run_with};
use latchkey_proto::v1;
use latchkey_proto::v1::quarantine_service_server::{QuarantineService, QuarantineServiceServer};

/// Knows one state, as `q-1`; reading `broken` breaks off.
#[derive(Clone, Default)]
struct Fake {
    accepted: Arc<Mutex<Vec<v1::AcceptStateRequest>>>,
    settled: Arc<Mutex<Vec<v1::SettleQuarantineRequest>>>,
}

#[tonic::async_trait]
impl QuarantineService for Fake {
    type ReadQuarantinedStream =
        Iter<std::vec::IntoIter<Result<v1::ReadQuarantinedResponse, Status>>>;

    async fn list_quarantined(
        &self,
        request: Request<v1::ListQuarantinedRequest>,
    ) -> Result<Response<v1::ListQuarantinedResponse>, Status> {
        let request = request.into_inner();
        let found = |id: &str| v1::Quarantined {
            quarantined_id: id.into(),
            run_id: "run-1".into(),
            phase: v1::Phase::Apply.into(),
            kind: v1::QuarantinedKind::ErroredState.into(),
            lineage: "l".into(),
            serial: 7,
            summary: "serial 7 continues the current 6 of the same lineage".into(),
            ..Default::default()
        };
        let (id, next) = match request.page_token.as_str() {
            "" => ("q-2", "more"),
            _ => ("q-1", ""),
        };
        Ok(Response::new(v1::ListQuarantinedResponse {
            quarantined: vec![found(id)],
            next_page_token: next.into(),
        }))
    }

    async fn read_quarantined(
        &self,
        request: Request<v1::ReadQuarantinedRequest>,
    ) -> Result<Response<Self::ReadQuarantinedStream>, Status> {
        let part = |data: &[u8]| Ok(v1::ReadQuarantinedResponse { data: data.to_vec() });
        let last = match request.into_inner().quarantined_id.as_str() {
            "broken" => Err(Status::internal("it is damaged")),
            _ => part(b"ret\"}"),
        };
        let parts = vec![part(b"{\"x\":\"sec"), last];
        Ok(Response::new(tokio_stream::iter(parts)))
    }

    async fn compare_quarantined(
        &self,
        request: Request<v1::CompareQuarantinedRequest>,
    ) -> Result<Response<v1::CompareQuarantinedResponse>, Status> {
        if request.into_inner().quarantined_id != "q-1" {
            return Err(Status::permission_denied("only an owner may"));
        }
        let attribute = v1::AttributeChange {
            path: "input".into(),
            before_json: "1".into(),
            after_json: "2".into(),
            sensitive: false,
        };
        let change = v1::StateChange {
            address: "terraform_data.one".into(),
            action: v1::StateChangeAction::Changed.into(),
            attributes: vec![attribute],
            truncated: false,
        };
        let diff = v1::StateDiff { changes: vec![change], changed: 1, ..Default::default() };
        Ok(Response::new(v1::CompareQuarantinedResponse { diff: Some(diff) }))
    }

    async fn accept_state(
        &self,
        request: Request<v1::AcceptStateRequest>,
    ) -> Result<Response<v1::AcceptStateResponse>, Status> {
        self.accepted.lock().unwrap().push(request.into_inner());
        let answer = v1::AcceptStateResponse { state_lineage: "l".into(), state_serial: 7 };
        Ok(Response::new(answer))
    }

    async fn drop_quarantined(
        &self,
        _: Request<v1::DropQuarantinedRequest>,
    ) -> Result<Response<v1::DropQuarantinedResponse>, Status> {
        Ok(Response::new(v1::DropQuarantinedResponse {}))
    }

    async fn settle_quarantine(
        &self,
        request: Request<v1::SettleQuarantineRequest>,
    ) -> Result<Response<v1::SettleQuarantineResponse>, Status> {
        let request = request.into_inner();
        let accepts = request.settlement() == v1::Settlement::Accept;
        self.settled.lock().unwrap().push(request);
        Ok(Response::new(v1::SettleQuarantineResponse {
            state_lineage: if accepts { "l".into() } else { String::new() },
            state_serial: if accepts { 7 } else { 0 },
            dropped: 2,
            unfrozen: accepts,
        }))
    }
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

struct Plane {
    fake: Fake,
    directory: tempfile::TempDir,
}

impl Plane {
    async fn start() -> Plane {
        let fake = Fake::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(QuarantineServiceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let plane = Plane { fake, directory: tempfile::tempdir().unwrap() };
        let credentials = serde_json::json!({
            "address": address, "token": "lku_canary", "organization": "acme",
            "insecure_plaintext": true,
        });
        let path = plane.path("credentials.json");
        std::fs::write(&path, credentials.to_string()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        plane
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    async fn run(&self, args: &[&str], stdin: &str) -> (Exit, String, String) {
        let (out, err) = (Shared::default(), Shared::default());
        let config = self.path("credentials.json");
        let all = ["latchkey", "--config", &config, "quarantine"];
        let all = all.into_iter().chain(args.iter().copied());
        let streams = Streams {
            stdin: Stdin::Lines(Box::new(Cursor::new(stdin.to_owned()))),
            stdout: Box::new(out.clone()),
            stderr: Box::new(err.clone()),
        };
        let run = run_with(all.map(Into::into), streams);
        let exit = tokio::time::timeout(Duration::from_secs(30), run).await.unwrap();
        (exit, out.text(), err.text())
    }
}

#[tokio::test]
async fn what_is_downloaded_is_ones_own_and_overwrites_nothing() {
    let plane = Plane::start().await;
    let file = plane.path("saved.tfstate");
    let (exit, out, err) = plane.run(&["download", "q-1", &file], "").await;
    assert_eq!((exit, out.as_str()), (Exit::Ok, ""), "{err}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{\"x\":\"secret\"}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    let (exit, _, err) = plane.run(&["download", "q-1", &file], "").await;
    assert_eq!(exit, Exit::Usage);
    assert!(err.contains("there already"), "{err}");
    let link = plane.path("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert_eq!(plane.run(&["download", "q-1", &link], "").await.0, Exit::Usage);
}

#[tokio::test]
async fn what_is_shown_of_a_state_is_how_it_differs_from_the_current() {
    let plane = Plane::start().await;
    let (exit, out, err) = plane.run(&["show", "q-1"], "").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    let expect = "From the current state to this one:\n~ terraform_data.one\n    input: 1 -> 2\n\
                  0 added, 1 changed, 0 removed\n";
    assert!(out.ends_with(expect), "{out}");
    // Who may not see the content is shown the rest.
    let (exit, out, err) = plane.run(&["show", "q-2"], "").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(out.contains("serial 7 continues") && !out.contains("input"), "{out}");
    assert!(err.contains("only an owner may"), "{err}");
}

#[tokio::test]
async fn a_download_that_breaks_off_leaves_nothing() {
    let plane = Plane::start().await;
    let file = plane.path("saved.tfstate");
    let (exit, _, _) = plane.run(&["download", "broken", &file], "").await;
    assert_eq!(exit, Exit::Unreachable);
    let left = std::fs::read_dir(plane.directory.path()).unwrap().count();
    assert_eq!(left, 1, "only the credentials are there");
}

#[tokio::test]
async fn a_state_is_accepted_by_the_name_that_was_typed() {
    let plane = Plane::start().await;
    let (exit, out, err) = plane.run(&["accept", "q-1", "--older"], "prod\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(err.contains("serial 7 continues the current 6"), "{err}");
    assert!(err.contains("if prod is frozen: `latchkey quarantine accept --run run-1`"), "{err}");
    assert_eq!(out, "The environment's state is now serial 7 of l\n");
    let accepted = plane.fake.accepted.lock().unwrap().clone();
    let expect = v1::AcceptStateRequest {
        organization: "acme".into(),
        quarantined_id: "q-1".into(),
        environment_confirmation: "prod".into(),
        older: true,
    };
    assert_eq!(accepted, [expect]);

    assert_eq!(plane.run(&["accept", "q-1"], "").await.0, Exit::WaitsForPerson);
    assert_eq!(plane.run(&["accept", "q-9"], "prod\n").await.0, Exit::Refused);
    assert_eq!(plane.fake.accepted.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn all_that_a_run_left_is_settled_by_one_command() {
    let plane = Plane::start().await;
    let (exit, out, err) = plane.run(&["accept", "--run", "run-1"], "prod\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(err.contains("q-1") && err.contains("q-2"), "{err}");
    let expect = "The environment's state is now serial 7 of l\nDropped: 2\n\
                  The environment is no longer frozen\n";
    assert_eq!(out, expect);
    let (exit, out, err) = plane.run(&["drop", "--run", "run-1"], "prod\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert_eq!(out, "Dropped: 2\nNo freeze was lifted\n");
    assert!(err.contains("latchkey env show prod"), "{err}");
    let settled = plane.fake.settled.lock().unwrap().clone();
    let request = |settlement: v1::Settlement| v1::SettleQuarantineRequest {
        organization: "acme".into(),
        run_id: "run-1".into(),
        environment_confirmation: "prod".into(),
        settlement: settlement.into(),
        older: false,
    };
    assert_eq!(settled, [request(v1::Settlement::Accept), request(v1::Settlement::Drop)]);

    // Nothing without the name, and one thing or a run, never both.
    assert_eq!(plane.run(&["drop", "--run", "run-1"], "").await.0, Exit::WaitsForPerson);
    assert_eq!(plane.run(&["drop"], "prod\n").await.0, Exit::Usage);
    assert_eq!(plane.run(&["accept", "q-1", "--run", "run-1"], "prod\n").await.0, Exit::Usage);
    assert_eq!(plane.fake.settled.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn all_pages_are_listed_with_names_for_programs() {
    let plane = Plane::start().await;
    let (exit, out, _) = plane.run(&["list", "-o", "json"], "").await;
    assert_eq!(exit, Exit::Ok);
    let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["quarantined"].as_array().unwrap().len(), 2);
    assert_eq!(listed["quarantined"][1]["kind"], "errored_state");
    assert_eq!(listed["quarantined"][1]["serial"], 7);
    let (_, out, _) = plane.run(&["list", "--run", "run-1"], "").await;
    assert!(out.contains("errored state") && out.contains("continues the current"), "{out}");
}

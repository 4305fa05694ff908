//! People: signing in, what a member may do, and how everything ends for who is revoked or removed.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use latchkey_harness::{LIMIT, Person, Stage, StageOptions, reason};
use latchkey_proto::v1::{self, Access, MfaPolicy, Phase, RunState};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tonic::{Code, Status, Streaming};

use crate::support::{options, small};

const PASSWORD: &str = "four words are enough";

/// A stage without runners: runs stay queued, and their streams open.
async fn stage() -> Stage {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    for environment in ["web", "vault"] {
        stage.owner.create_environment(environment, MfaPolicy::Never).await.unwrap();
    }
    stage
}

async fn sign_in(stage: &Stage, user: &str, password: &str) -> Result<Person, Status> {
    let stranger = Person::with_token(&stage.plane, Stage::ORGANIZATION, user, "none").unwrap();
    let request = v1::SignInRequest {
        user: user.into(),
        password: password.into(),
        client: "the test".into(),
    };
    let token = stranger.sessions().sign_in(request).await?.into_inner().token;
    Ok(Person::with_token(&stage.plane, Stage::ORGANIZATION, user, &token).unwrap())
}

async fn set_access(owner: &Person, user: &str, environment: &str, access: Access) {
    let entry = v1::EnvironmentAccess { environment: environment.into(), access: access.into() };
    let request = v1::UpdateMemberRequest {
        organization: Stage::ORGANIZATION.into(),
        user: user.into(),
        environments: vec![entry],
        ..Default::default()
    };
    owner.members().update_member(request).await.unwrap();
}

/// Opens the stream and takes what it tells first.
async fn watch(person: &Person, run: &v1::Run) -> Streaming<v1::WatchRunResponse> {
    let request = v1::WatchRunRequest { run_id: run.run_id.clone() };
    let mut stream = person.runs().watch_run(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.run.unwrap().state(), RunState::PlanQueued);
    stream
}

async fn follow(person: &Person, run: &v1::Run) -> Streaming<v1::ReadLogResponse> {
    let request = v1::ReadLogRequest {
        run_id: run.run_id.clone(),
        phase: Phase::Plan.into(),
        offset: 0,
        follow: true,
    };
    person.runs().read_log(request).await.unwrap().into_inner()
}

/// Reads until the stream ends, and returns what by.
async fn end_of<T>(mut stream: Streaming<T>) -> Status {
    let read = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok("it ended well"),
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("the stream goes on")
}

#[tokio::test]
async fn a_revoked_session_ends_with_its_streams_and_its_calls() {
    let stage = stage().await;
    let bob = stage.owner.create_user(&stage.plane, "bob", v1::Role::Member).await.unwrap();
    let status = sign_in(&stage, "bob", PASSWORD).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unauthenticated, "SIGN_IN_REJECTED")
    );
    let password =
        v1::SetPasswordRequest { current_password: String::new(), new_password: PASSWORD.into() };
    bob.sessions().set_password(password).await.unwrap();

    let laptop = sign_in(&stage, "bob", PASSWORD).await.unwrap();
    let phone = sign_in(&stage, "bob", PASSWORD).await.unwrap();
    let run = laptop.queue("web", &small()).await.unwrap();
    let (watched, log) = (watch(&laptop, &run).await, follow(&laptop, &run).await);
    let still_watched = watch(&phone, &run).await;

    let listed = phone.sessions().list_sessions(v1::ListSessionsRequest {}).await.unwrap();
    let sessions = listed.into_inner().sessions;
    let [current, other] = sessions.as_slice() else { panic!("{sessions:?}") };
    assert!(current.current && !other.current && other.client == "the test");
    let request = v1::RevokeSessionRequest { session_id: other.session_id.clone() };
    phone.sessions().revoke_session(request).await.unwrap();

    assert_eq!(end_of(watched).await.code(), Code::Unauthenticated);
    assert_eq!(end_of(log).await.code(), Code::Unauthenticated);
    let status = laptop.run(&run.run_id).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unauthenticated, "IDENTITY_REQUIRED")
    );
    // The other session goes on, until it is signed out.
    assert_eq!(phone.run(&run.run_id).await.unwrap().state(), RunState::PlanQueued);
    phone.sessions().sign_out(v1::SignOutRequest {}).await.unwrap();
    assert_eq!(end_of(still_watched).await.code(), Code::Unauthenticated);
    // The token that was handed over ended with the first password.
    let status = bob.run(&run.run_id).await.unwrap_err();
    assert_eq!(reason(&status), "IDENTITY_REQUIRED");
    let log = stage.plane.log();
    assert!(!log.contains(PASSWORD), "{log}");
}

#[tokio::test]
async fn a_member_does_what_their_access_says_and_nothing_once_removed() {
    let stage = stage().await;
    let ada = &stage.owner;
    let bob = ada.create_user(&stage.plane, "bob", v1::Role::Member).await.unwrap();
    set_access(ada, "bob", "web", Access::Read).await;
    set_access(ada, "bob", "vault", Access::None).await;
    let run = ada.queue("web", &small()).await.unwrap();
    let (watched, log) = (watch(&bob, &run).await, follow(&bob, &run).await);

    let status = bob.queue("web", &small()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, "NOT_ALLOWED"));
    let hidden = bob.environment("vault").await.unwrap_err();
    let absent = bob.environment("nothing").await.unwrap_err();
    assert_eq!((hidden.code(), hidden.message()), (Code::NotFound, absent.message()));
    let secret = ada.queue("vault", &small()).await.unwrap();
    assert_eq!(bob.run(&secret.run_id).await.unwrap_err().code(), Code::NotFound);

    let request =
        v1::RemoveMemberRequest { organization: Stage::ORGANIZATION.into(), user: "bob".into() };
    ada.members().remove_member(request).await.unwrap();
    assert_eq!(end_of(watched).await.code(), Code::NotFound);
    assert_eq!(end_of(log).await.code(), Code::NotFound);
    assert_eq!(bob.run(&run.run_id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(bob.environment("web").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_revoked_service_token_ends_with_its_streams() {
    let stage = stage().await;
    let ci = stage.owner.create_service_token(&stage.plane, "ci").await.unwrap();
    let run = ci.queue("web", &small()).await.unwrap();
    let watched = watch(&ci, &run).await;
    let request = v1::RevokeServiceTokenRequest {
        organization: Stage::ORGANIZATION.into(),
        name: "ci".into(),
    };
    stage.owner.accounts().revoke_service_token(request).await.unwrap();
    assert_eq!(end_of(watched).await.code(), Code::Unauthenticated);
    assert_eq!(ci.run(&run.run_id).await.unwrap_err().code(), Code::Unauthenticated);
}

/// Somebody at a terminal of their own: their credentials file, and what they type.
pub(crate) struct Terminal<'a> {
    stage: &'a Stage,
    config: PathBuf,
}

impl<'a> Terminal<'a> {
    pub(crate) fn of(stage: &'a Stage, who: &str) -> Self {
        Self { stage, config: stage.directory().join(format!("{who}.json")) }
    }

    /// Runs `latchkey` and returns its exit code and both its outputs.
    pub(crate) async fn run(&self, arguments: &str, typed: &str) -> (i32, String, String) {
        let mut command = self.stage.programs().cli().command();
        command.arg("--config").arg(&self.config).args(arguments.split(' '));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(typed.as_bytes()).await.unwrap();
        let ended = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
        let ended = ended.expect("it does not end").unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (ended.status.code().unwrap_or(-1), text(&ended.stdout), text(&ended.stderr))
    }

    /// Runs what must go well and returns what it wrote.
    pub(crate) async fn done(&self, arguments: &str, typed: &str) -> String {
        let (code, out, err) = self.run(arguments, typed).await;
        assert_eq!(code, 0, "{arguments}: {err}");
        out
    }

    pub(crate) async fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.done(&format!("{arguments} -o json"), "").await).unwrap()
    }

    pub(crate) fn login(&self, more: &str) -> String {
        let (url, ca) = (self.stage.plane.people_url(), self.stage.plane.ca_file().display());
        format!("login {url} --ca-file {ca}{more}")
    }
}

#[tokio::test]
async fn people_are_managed_from_the_command_line() {
    let stage = stage().await;
    let (ada, bob) = (Terminal::of(&stage, "ada"), Terminal::of(&stage, "bob"));
    ada.done(&ada.login(""), &format!("{}\n", stage.owner.token())).await;
    let token = ada.done("user create bob --role member --access read", "").await;
    bob.done(&bob.login(""), &token).await;
    assert_eq!(bob.done("password", &format!("{PASSWORD}\n")).await, "The password is set\n");
    bob.done(&bob.login(" --user bob"), &format!("{PASSWORD}\n")).await;

    ada.done("member set bob --env web=write --env vault=none", "").await;
    let listed = ada.done("member list", "").await;
    assert!(listed.contains("vault=none web=write"), "{listed}");
    let own = bob.json("member list").await;
    assert_eq!(own["members"][0]["environments"]["web"], "write");
    assert_eq!(own["members"].as_array().unwrap().len(), 1);
    let (code, _, err) = ada.run("member set ada --role member", "").await;
    assert_eq!(code, 1);
    assert!(err.contains("LAST_OWNER") && err.contains("hint:"), "{err}");

    let sessions = bob.json("session list").await;
    assert_eq!(sessions["sessions"][0]["current"], true);
    assert!(bob.done("session list", "").await.contains("latchkey "));
    bob.done("logout", "").await;
    bob.done(&bob.login(" --user bob"), &format!("{PASSWORD}\n")).await;
    assert_eq!(bob.json("session list").await["sessions"].as_array().unwrap().len(), 1);

    ada.done("service-token create ci --env web --access read", "").await;
    let tokens = ada.json("service-token list").await;
    assert_eq!(tokens["service_tokens"][0]["environments"][0], "web");
    assert!(ada.done("service-token list", "").await.contains("ci"));
    ada.done("service-token revoke ci", "").await;
    assert_eq!(ada.done("service-token list", "").await, "no service tokens\n");

    let (code, _, err) = ada.run("user reset bob", "bbo\n").await;
    assert_eq!(code, 2, "{err}");
    let token = ada.done("user reset bob", "bob\n").await;
    assert_eq!(bob.run("whoami", "").await.0, 5);
    bob.done(&bob.login(""), &token).await;
    ada.done("member remove bob --yes", "").await;
    let (code, _, err) = bob.run("env list --organization acme", "").await;
    assert_eq!(code, 1, "{err}");
    ada.done("member add bob --role owner", "").await;
    assert!(bob.done("user list --organization acme", "").await.contains("ada"));
}

//! `login` and `whoami` against a control plane of the test's own, with TLS from a CA of its own.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use latchkey_cli::{Exit, Stdin, Streams, run_with};
use latchkey_proto::v1;
use latchkey_proto::v1::account_service_server::{AccountService, AccountServiceServer};
use latchkey_proto::v1::session_service_server::{SessionService, SessionServiceServer};

/// Knows one person and one secret.
struct Accounts;

#[tonic::async_trait]
impl AccountService for Accounts {
    async fn bootstrap(
        &self,
        request: Request<v1::BootstrapRequest>,
    ) -> Result<Response<v1::BootstrapResponse>, Status> {
        let request = request.into_inner();
        assert_eq!((request.organization.as_str(), request.user.as_str()), ("acme", "alice"));
        assert_eq!(request.secret, "once");
        Ok(Response::new(v1::BootstrapResponse { token: "lku_canary".into() }))
    }

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        match request.metadata().get("authorization") {
            Some(value) if value == "Bearer lku_canary" || value == "Bearer lki_session" => {}
            Some(_) | None => return Err(Status::unauthenticated("this token is not known")),
        }
        let membership =
            v1::Membership { organization: "acme".into(), role: v1::Role::Owner.into() };
        Ok(Response::new(v1::WhoAmIResponse {
            user: "alice".into(),
            memberships: vec![membership],
            ..Default::default()
        }))
    }

    async fn acknowledge_break_glass(
        &self,
        _: Request<v1::AcknowledgeBreakGlassRequest>,
    ) -> Result<Response<v1::AcknowledgeBreakGlassResponse>, Status> {
        Ok(Response::new(v1::AcknowledgeBreakGlassResponse {}))
    }

    async fn create_user(
        &self,
        _: Request<v1::CreateUserRequest>,
    ) -> Result<Response<v1::CreateUserResponse>, Status> {
        Ok(Response::new(v1::CreateUserResponse { token: "lku_bob".into() }))
    }

    async fn create_service_token(
        &self,
        _: Request<v1::CreateServiceTokenRequest>,
    ) -> Result<Response<v1::CreateServiceTokenResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn reset_user(
        &self,
        _: Request<v1::ResetUserRequest>,
    ) -> Result<Response<v1::ResetUserResponse>, Status> {
        Ok(Response::new(v1::ResetUserResponse { token: "lk_new".into() }))
    }

    async fn list_service_tokens(
        &self,
        _: Request<v1::ListServiceTokensRequest>,
    ) -> Result<Response<v1::ListServiceTokensResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn revoke_service_token(
        &self,
        _: Request<v1::RevokeServiceTokenRequest>,
    ) -> Result<Response<v1::RevokeServiceTokenResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

/// Counts the sessions that were ended.
#[derive(Clone, Default)]
struct Sessions(Arc<Mutex<u32>>);

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn sign_in(
        &self,
        request: Request<v1::SignInRequest>,
    ) -> Result<Response<v1::SignInResponse>, Status> {
        let request = request.into_inner();
        // Blanks are part of a password.
        if (request.user.as_str(), request.password.as_str()) != ("alice", " canary password ") {
            return Err(Status::unauthenticated("the name or the password is wrong"));
        }
        assert!(request.client.starts_with("latchkey ") && request.client.len() <= 64);
        Ok(Response::new(v1::SignInResponse { token: "lki_session".into(), session: None }))
    }

    async fn sign_out(
        &self,
        request: Request<v1::SignOutRequest>,
    ) -> Result<Response<v1::SignOutResponse>, Status> {
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer lki_session");
        *self.0.lock().unwrap() += 1;
        Ok(Response::new(v1::SignOutResponse {}))
    }

    async fn list_sessions(
        &self,
        _: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn revoke_session(
        &self,
        _: Request<v1::RevokeSessionRequest>,
    ) -> Result<Response<v1::RevokeSessionResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn set_password(
        &self,
        request: Request<v1::SetPasswordRequest>,
    ) -> Result<Response<v1::SetPasswordResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.current_password, " canary password ");
        assert_eq!(request.new_password, "another canary");
        Ok(Response::new(v1::SetPasswordResponse { ended_sessions: 2 }))
    }
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
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

struct Plane {
    address: String,
    sessions: Sessions,
    directory: tempfile::TempDir,
}

impl Plane {
    async fn start() -> Plane {
        let ca = authority("ours");
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap();
        let identity = Identity::from_pem(certificate.pem(), key.serialize_pem());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let sessions = Sessions::default();
        let server = Server::builder()
            .tls_config(ServerTlsConfig::new().identity(identity))
            .unwrap()
            .add_service(AccountServiceServer::new(Accounts))
            .add_service(SessionServiceServer::new(sessions.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
        std::fs::write(directory.path().join("other.pem"), authority("other").pem()).unwrap();
        Plane { address, sessions, directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    async fn run(&self, args: &[&str], stdin: &str) -> (Exit, String, String) {
        let (out, err) = (Shared::default(), Shared::default());
        let config = self.path("credentials.json");
        let all = ["latchkey", "--config", &config].into_iter().chain(args.iter().copied());
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
async fn a_checked_token_is_kept_and_used() {
    let plane = Plane::start().await;
    let ca = plane.path("ca.pem");
    let login = ["login", &plane.address, "--ca-file", &ca];
    let (exit, out, err) = plane.run(&login, "lku_canary\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(out.contains("Signed in as alice") && out.contains("owner in acme"), "{out}");
    assert!(!out.contains("canary") && !err.contains("canary"));

    let (exit, out, _) = plane.run(&["whoami", "-o", "json"], "").await;
    assert_eq!(exit, Exit::Ok);
    let caller: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(caller["user"], "alice");
    assert_eq!(caller["default_organization"], "acme");
    let (exit, out, _) = plane.run(&["user", "create", "bob", "--role", "member"], "").await;
    assert_eq!((exit, out.as_str()), (Exit::Ok, "lku_bob\n"));

    let (exit, out, _) = plane.run(&["logout", "-o", "json"], "").await;
    assert_eq!(exit, Exit::Ok);
    assert!(out.contains(r#""ended_session": false"#), "{out}");
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::NotSignedIn);
}

#[tokio::test]
async fn a_password_opens_a_session_that_logout_ends() {
    let plane = Plane::start().await;
    let ca = plane.path("ca.pem");
    let login = ["login", &plane.address, "--ca-file", &ca, "--user", "alice"];
    let (exit, _, err) = plane.run(&login, "canary password\n").await;
    assert_eq!(exit, Exit::NotSignedIn);
    assert!(!err.contains("canary"), "{err}");
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::NotSignedIn);

    let (exit, out, err) = plane.run(&login, " canary password \n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(out.contains("Signed in as alice"), "{out}");
    assert!(!out.contains("canary") && !err.contains("canary"));
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::Ok);
    let (exit, out, err) = plane.run(&["password"], " canary password \nanother canary\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert_eq!(out, "The password is set; 2 other sessions were ended\n");

    let (exit, out, _) = plane.run(&["logout", "-o", "json"], "").await;
    assert_eq!(exit, Exit::Ok);
    assert!(out.contains(r#""ended_session": true"#), "{out}");
    assert_eq!(*plane.sessions.0.lock().unwrap(), 1);
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::NotSignedIn);
}

#[tokio::test]
async fn a_token_that_is_not_known_is_not_kept() {
    let plane = Plane::start().await;
    let ca = plane.path("ca.pem");
    let (exit, _, err) =
        plane.run(&["login", &plane.address, "--ca-file", &ca], "lku_other\n").await;
    assert_eq!(exit, Exit::NotSignedIn);
    assert!(!err.contains("lku_other"), "{err}");
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::NotSignedIn);
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_with_the_remedy() {
    let plane = Plane::start().await;
    let other = plane.path("other.pem");
    let (exit, _, err) =
        plane.run(&["login", &plane.address, "--ca-file", &other], "lku_canary\n").await;
    assert_eq!(exit, Exit::Unreachable, "{err}");
    assert!(err.contains("certificate") && err.contains("--ca-file"), "{err}");
    // Without a file the platform's roots are asked, which do not know our CA either.
    let (exit, _, err) = plane.run(&["login", &plane.address], "lku_canary\n").await;
    assert_ne!(exit, Exit::Ok, "{err}");
}

#[tokio::test]
async fn the_one_time_secret_buys_the_first_token() {
    let plane = Plane::start().await;
    let ca = plane.path("ca.pem");
    let login = [
        "login",
        &plane.address,
        "--ca-file",
        &ca,
        "--bootstrap",
        "--organization",
        "acme",
        "--user",
        "alice",
    ];
    let (exit, out, err) = plane.run(&login, "once\n").await;
    assert_eq!(exit, Exit::Ok, "{err}");
    assert!(out.contains("Signed in as alice"), "{out}");
    assert_eq!(plane.run(&["whoami"], "").await.0, Exit::Ok);
}

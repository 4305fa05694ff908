//! The physics of a service: tonic over TLS with the messages of `RunnerService`, and nothing
//! behind it. A process of its own, as the control plane is.
//!
//! - `Enroll` answers an empty message.
//! - `Lease` answers each frame.
//! - `AppendLog` writes what has come to a file, syncs it, and answers; what comes meanwhile is
//!   the next batch.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use latchkey_harness::Program;
use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as In;
use latchkey_proto::v1::lease_response::Frame as Out;
use latchkey_proto::v1::runner_service_server::{RunnerService, RunnerServiceServer};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use latchkey_harness::simulated_runner::Listener;

/// First argument of this executable that makes it this server.
pub(crate) const NAME: &str = "bare-tonic";

/// A bare server. It ends with its handle.
pub(crate) struct Bare {
    child: Child,
    pub(crate) listener: Listener,
    /// Holds its certificate and what it writes.
    _directory: TempDir,
}

impl Bare {
    /// Starts one on a free port; clients may show certificates of the CA in `client_ca`.
    pub(crate) async fn start(client_ca: &Path) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("latchkey-bare-").tempdir()?;
        let ca_pem = make_identity(directory.path())?;
        let program = Program { exe: std::env::current_exe()?, prefix: vec![NAME.into()] };
        let mut command = program.command();
        command.arg(directory.path()).arg(client_ca).stdout(Stdio::piped());
        let mut child = command.spawn().context("start the bare server")?;
        let stdout = child.stdout.take().context("read the bare server's address")?;
        let line = BufReader::new(stdout).lines().next_line().await?;
        let address = line.context("the bare server ended at once")?;
        let listener = Listener { url: format!("https://{address}"), ca_pem: ca_pem.into() };
        Ok(Self { child, listener, _directory: directory })
    }

    pub(crate) fn pid(&self) -> anyhow::Result<i32> {
        let pid = self.child.id().context("the bare server has ended")?;
        Ok(i32::try_from(pid)?)
    }
}

/// Writes a certificate for loopback and its key; returns the CA's certificate.
fn make_identity(directory: &Path) -> anyhow::Result<String> {
    let ca_key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key)?;
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate()?;
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &issuer)?;
    std::fs::write(directory.join("server.pem"), format!("{}{}", server.pem(), ca.pem()))?;
    std::fs::write(directory.join("server.key"), key.serialize_pem())?;
    Ok(ca.pem())
}

/// Is the server, if this process was started to be it.
pub(crate) fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(2).map(PathBuf::from);
    let (Some(directory), Some(client_ca)) = (args.next(), args.next()) else {
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let served = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(serve(directory, &client_ca)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("{NAME}: failed to {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(directory: PathBuf, client_ca: &Path) -> anyhow::Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("read {path:?}"));
    let chain = read(&directory.join("server.pem"))?;
    let identity = Identity::from_pem(chain, read(&directory.join("server.key"))?);
    let tls = ServerTlsConfig::new()
        .identity(identity)
        .client_ca_root(Certificate::from_pem(read(client_ca)?))
        .client_auth_optional(true);
    // Bound as the control plane binds: whoever reconnects at once must wait as long here.
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = socket.local_addr()?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{address}")?;
    stdout.flush()?;
    let service = Nothing { directory: Arc::new(directory), files: Arc::default() };
    let nodelay = TcpListenerStream::new(socket).map(|accepted| {
        let stream = accepted?;
        stream.set_nodelay(true)?;
        std::io::Result::Ok(stream)
    });
    let serving = Server::builder()
        .tls_config(tls)?
        .max_concurrent_streams(256)
        .add_service(RunnerServiceServer::new(service))
        .serve_with_incoming(nodelay);
    let mut nothing = [0];
    tokio::select! {
        served = serving => served.context("serve"),
        // Whoever started it is gone.
        _ = async { tokio::io::stdin().read(&mut nothing).await } => Ok(()),
    }
}

#[derive(Clone, Debug)]
struct Nothing {
    directory: Arc<PathBuf>,
    /// Counts the files it wrote.
    files: Arc<AtomicU64>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl RunnerService for Nothing {
    type LeaseStream = Answers<v1::LeaseResponse>;
    type FetchArtifactStream = Answers<v1::FetchArtifactResponse>;
    type AppendLogStream = Answers<v1::AppendLogResponse>;

    async fn enroll(
        &self,
        _: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        Ok(Response::new(v1::EnrollResponse::default()))
    }

    async fn lease(
        &self,
        request: Request<Streaming<v1::LeaseRequest>>,
    ) -> Result<Response<Self::LeaseStream>, Status> {
        let answers = request.into_inner().map(|frame| {
            let frame = match frame?.frame {
                Some(In::Hello(_)) => Out::Welcome(v1::Welcome::default()),
                Some(_) | None => Out::Renewed(v1::Renewed::default()),
            };
            Ok(v1::LeaseResponse { frame: Some(frame) })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn append_log(
        &self,
        request: Request<Streaming<v1::AppendLogRequest>>,
    ) -> Result<Response<Self::AppendLogStream>, Status> {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let mut file = Arc::new(File::create(self.directory.join(format!("{number}.log")))?);
        let mut chunks = request.into_inner();
        let (arrived, mut waiting) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = chunks.message().await {
                if arrived.send(chunk.data).await.is_err() {
                    return;
                }
            }
        });
        let (sender, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut durable_length = 0;
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, 16).await > 0 {
                let pieces = std::mem::take(&mut batch);
                durable_length += pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
                let to = Arc::clone(&file);
                let written = tokio::task::spawn_blocking(move || {
                    pieces.iter().try_for_each(|piece| (&*to).write_all(piece))?;
                    to.sync_data()?;
                    std::io::Result::Ok(to)
                });
                let Ok(Ok(back)) = written.await else { return };
                file = back;
                let answer = Ok(v1::AppendLogResponse { durable_length });
                if sender.send(answer).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn fetch_artifact(
        &self,
        _: Request<v1::FetchArtifactRequest>,
    ) -> Result<Response<Self::FetchArtifactStream>, Status> {
        Err(Status::unimplemented("nothing is here to fetch"))
    }

    async fn upload_artifact(
        &self,
        _: Request<Streaming<v1::UploadArtifactRequest>>,
    ) -> Result<Response<v1::UploadArtifactResponse>, Status> {
        Err(Status::unimplemented("nothing is kept here"))
    }
}
